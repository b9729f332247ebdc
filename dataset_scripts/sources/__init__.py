"""All declared collections, by the name that `--source` takes."""

from dataset_scripts.entries import Source
from dataset_scripts.sources.brats import Brats
from dataset_scripts.sources.busi import Busi
from dataset_scripts.sources.chexpert import CheXpert
from dataset_scripts.sources.cholect50 import CholecT50
from dataset_scripts.sources.ct_rate import CtRate
from dataset_scripts.sources.folder import Folder
from dataset_scripts.sources.hyperkvasir_videos import HyperKvasirVideos
from dataset_scripts.sources.ldpolypvideo import LDPolypVideo
from dataset_scripts.sources.lidc_idri import LidcIdri
from dataset_scripts.sources.medmnist import MedMnist
from dataset_scripts.sources.mimic_cxr_jpg import MimicCxrJpg
from dataset_scripts.sources.msd import Msd, MsdMri
from dataset_scripts.sources.nih_chestxray14 import NihChestXray14
from dataset_scripts.sources.oasis import Oasis
from dataset_scripts.sources.padchest import PadChest
from dataset_scripts.sources.phantom import Phantom
from dataset_scripts.sources.pocus_lung import PocusLung


SOURCES: dict[str, type[Source]] = {
    source.name: source
    for source in (
        *(Folder, Phantom),
        *(CheXpert, MimicCxrJpg, NihChestXray14, PadChest),  # X-ray
        *(Busi, PocusLung),  # ultrasound
        *(CholecT50, HyperKvasirVideos, LDPolypVideo),  # endoscopy
        *(CtRate, LidcIdri, Msd),  # CT
        *(Brats, MsdMri, Oasis),  # MRI
        MedMnist,  # several modalities
    )
}
