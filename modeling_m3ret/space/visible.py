"""Decide which words of a gallery visitors may see. No other code decides it.

A cell of a manifest may hold anything: a patient's name, a date, a path, HTML. No pattern recognises a name, so words
are listed instead. A value that is not in a list is treated as missing, everywhere: on the page, in downloads, in
answers of the endpoints and in the index that `app.py --push_to_hub` uploads. Ids and patients are never shown.

| column | shown if |
|---|---|
| modality | it is a modality of the schema |
| anatomy, labels | all its words are in `WORDS`, or the owner has set `--show_labels` |
| source | it is the title of a collection in `SOURCES` |
"""

from __future__ import annotations

import re
from collections.abc import Collection

import pyarrow as pa

from ..data.schema import MODALITIES
from ..phantom import SYNTHETIC_SOURCE


SAMPLE_SOURCE = "pydicom-data"
# titles of the collections that dataset_scripts can build, listed here because a Space does not contain that package;
# the last line is the demo gallery
SOURCES = frozenset({
    SYNTHETIC_SOURCE, SAMPLE_SOURCE, "a folder of scans", "Breast Ultrasound Images (BUSI)", "CheXpert", "CholecT50",
    "COVID-19 Lung Ultrasound (POCUS)", "CT-RATE", "HyperKvasir, labelled videos", "LDPolypVideo", "LIDC-IDRI",
    "Medical Segmentation Decathlon, CT", "Medical Segmentation Decathlon, MRI", "MedMNIST+", "MIMIC-CXR-JPG",
    "NIH ChestX-ray14", "OASIS-3", "PadChest", "RSNA-ASNR-MICCAI BraTS 2021",
    "BUS-BRA", "COVID-19-NY-SBU", "EndoTect", "HC18", "IQ-OTH/NCCD", "Kvasir-SEG", "OpenKBP", "TimTrack",
})  # fmt: skip
# body regions, findings and qualifiers of those collections and of DICOM's body parts (PS3.16, annex L). No first name,
# few surnames, and no digits but those of covid-19 and of the weightings of MRI
WORDS = frozenset(
    """
    abdomen abdominal abdominopelvic abnormal abnormality abscess acetabulum acute adc adenocarcinoma adenoma
    adenomatous adrenal adult airspace airway and aneurysm angioectasia angiography ankle anterior anteroposterior
    anus aorta aortic ap appendix arch arm arterial artery ascites atelectasis atherosclerosis atrium attenuation
    axial axilla back bacterial barretts benign bilateral biliary bladder bleeding blood body bone bones bowel
    brachial brain brainstem breast breasts bronchiectasis bronchitis bronchus buckle buttock caecum calcaneus
    calcification calcified calculus calf calot calot-triangle-dissection cancer carcinoma cardiac cardiomediastinum
    cardiomegaly carotid catheter cavitation cavity cecum cell central cerebellum cerebral cervical cervix chest
    chronic cirrhosis clavicle cleaning clip clipping coagulation coccyx colitis collapse colon colorectal
    congestion consolidation contrast contusion coronal coronary covid covid-19 covid19 cranial cranium cropped ct
    cta cutting cyst cystic cysts deep defect degeneration degenerative dementia descending device devices diaphragm
    diffuse dilatation dilated disease dislocation displaced dissection distal diverticulosis diverticulum doppler
    dorsal duodenum dwi dyed ear early edema effusion elbow embolism emphysema endobronchial endometrium endoscopy
    enhanced enhancing enlarged enlargement erosion esophagitis esophagus external extremity eye eyes face facial
    fatty femoral femur fetal fibrosis fibrotic fibula film finding findings finger flair fluid focal foot forearm
    fracture fractures frontal gallbladder gallstone ganglion gastritis gastrointestinal gi gland glioblastoma
    glioma goitre grade granuloma groin haemorrhage haemorrhoids hand head heart hematochezia hematoma hemithorax
    hemorrhage hemorrhoids hernia hiatal high hilar hip humerus hydronephrosis hyperdense hyperintense hyperplasia
    hyperplastic hypertrophy hypodense hypointense ileum iliac impacted implant infarct infarction infection
    inferior infiltrate infiltrating infiltration inflammation inflammatory injury inner instrument instruments
    interlobular internal interstitial intestine ischemia ischemic jaw joint kidney kidneys knee laparoscopy large
    larynx lateral left leftparotid leg lesion lesions lifted ligament limb limbs liver lobe low lower lumbar lung
    lungs lymph lymphadenopathy lymphoid lymphoma malignant mammography mandible margin margins mass masses material
    maxilla medial mediastinum medical melanoma meningioma metastases metastasis middle mild minimal moderate mosaic
    mouth mra mri mucosa multiple muscle nasal nasopharynx neck necrosis neoplasm nerve no node nodes nodular nodule
    nodules non nondisplaced none normal nose oblique obstruction oedema oesophagus of opacification opacities
    opacity oral orbit oropharynx osteoarthritis osteoporosis other outer ovary pa pacemaker packaging palate
    pancreas parotid partial patella pathological pathology pattern pd pelvic pelvis penis perforation peribronchial
    pericardial pericardium peripheral peritoneum phalanx phantom pharynx pituitary placenta plane pleura pleural
    pneumonia pneumoperitoneum pneumothorax polyp polyps portal posterior postoperative preoperative preparation
    primary prostate proximal pulmonary pylorus quality radiograph radius rectum reflux region regular renal
    resection retina retraction retroflex rib ribs right rightparotid rupture sacrum sagittal salivary sarcoma
    scapula scar schwannoma sclerosis scoliosis scrotum secondary septal sequela severe shoulder sigmoid simple
    sinus skin skull slices small spinal spinalcord spine spleen squamous stage stenosis stent sternum stomach stone
    stones stool stricture stroke subclavian submandibular superficial superior supine support surgical swelling t1
    t1c t1w t2 t2w talus teeth temporal terminal testis thickening thigh thoracic thorax thrombosis thrombus thumb
    thymus thyroid tibia tissue toe tongue tooth torso total trachea tract transverse trauma triangle tube
    tuberculosis tumor tumors tumour tumours ulcer ulcerative ultrasound uncertain uninformative unknown
    unremarkable upper ureter urethra uterus vagina valve varices vascular vein ventricle vertebra vessel view viral
    vulva wall with without wrist x-ray xray z-line
    """.split()  # noqa: SIM905
)


def is_visible(text: str) -> bool:
    """Return whether an anatomy or a label consists of known words only, separated by spaces or punctuation."""
    words = re.split(r"[\s_,./]+", text.strip().casefold())
    parts = (part for word in words for part in ([word] if word in WORDS else word.split("-")))
    return len(text) <= 80 and text.isprintable() and all(part in WORDS for part in parts)


def visible_columns(metadata: pa.Table, show_labels: bool = False) -> pa.Table:
    """Return the columns modality, anatomy, labels and source of an index, with empty values for what is not shown.

    Args:
        metadata: of `RetrievalIndex`.
        show_labels: whether the owner of the gallery lets visitors see modality, anatomy and labels as they are.
    """

    def cells(column: str, known: Collection[str], show_all: bool) -> list[str]:
        values = [value or "" for value in metadata.column(column).to_pylist()]  # may be null
        return [value if show_all or value in known else "" for value in values]

    anatomies = set(filter(is_visible, {text or "" for text in metadata.column("anatomy").to_pylist()}))
    labels = [
        [label for label in row or [] if label and (show_labels or is_visible(label))]
        for row in metadata.column("labels").to_pylist()
    ]
    return pa.table(
        {
            "modality": cells("modality", MODALITIES, show_labels),
            "anatomy": cells("anatomy", anatomies, show_labels),
            "labels": pa.array(labels, pa.list_(pa.string())),
            "source": cells("source", SOURCES, False),
        }
    )
