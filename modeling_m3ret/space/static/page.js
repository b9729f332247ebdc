// Scripts of the page: clicks on cards, and the viewer. Drawing is NiiVue's; the server sends pixels, not pictures.
'use strict'
window.m3ret = (() => {
  const NIIVUE = 'm3ret/niivue-0.69.0.umd.js'
  // colours of a confidence of 0, 0.05, 0.25, 0.5 and 1, whose square roots are stored
  const HEAT = {
    R: [0, 120, 200, 255, 255], G: [0, 20, 50, 140, 240], B: [0, 90, 60, 20, 120], A: [0, 255, 255, 255, 255], I: [0, 57, 128, 180, 255]
  }
  const wait = (script) => new Promise((resolve, reject) => {
    const node = Object.assign(document.createElement('script'), { src: script, onload: resolve })
    node.onerror = () => reject(new Error('The viewer could not be loaded. Reload the page.'))
    document.head.append(node)
  })
  const smooth = () => matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'
  let loading = null // of NiiVue, when the first result is opened
  let opener = null // the card to which the focus returns

  // Report clicks on cards as selections, and show or hide cards that look the same.
  function clickable (element, trigger, watch) {
    element.addEventListener('click', (event) => {
      const more = event.target.closest('.more')
      if (more) {
        const show = more.getAttribute('aria-expanded') === 'false'
        more.setAttribute('aria-expanded', show)
        for (let item = more.parentElement.nextElementSibling; item?.querySelector('.twin'); item = item.nextElementSibling) {
          item.hidden = !show
        }
        return
      }
      const card = event.target.closest('[data-index]')
      if (card) {
        opener = card
        showTip(null)
        trigger('select', { index: Number(card.dataset.index), value: null })
      }
    })
    // on a phone, the results are below the upload: bring them into view once they are laid out, but do not leave the viewer
    const reveal = () => setTimeout(() => {
      if (!document.querySelector('#viewer')?.hidden) return
      const first = element.closest('#results')?.querySelector('#status') ?? element
      const { top } = first.getBoundingClientRect()
      if (element.innerText && (top < 0 || top > innerHeight * 0.7)) first.scrollIntoView({ behavior: smooth() })
    }, 250)
    watch('value', reveal)
    if (element.closest('#results')) reveal() // it was not on the page until there were results
    element.dataset.clickable = '' // tests wait for it: a click before is lost
  }

  // Show the thumbnail of a point of the map beside it while the pointer is there.
  document.addEventListener('pointerover', (event) => showTip(event.target.closest?.('circle[data-index]')))
  function showTip (point) {
    const tip = document.getElementById('map-tip') ?? Object.assign(document.createElement('div'), { id: 'map-tip', className: 'card' })
    tip.hidden = !point
    if (!point) return
    const box = point.getBoundingClientRect()
    const image = Object.assign(document.createElement('img'), { src: `m3ret/thumbnail/${point.dataset.index}.webp`, alt: '' })
    tip.replaceChildren(image, point.dataset.tip)
    tip.style.cssText = `left: ${Math.min(box.right + 8, innerWidth - 180)}px; top: ${Math.min(box.bottom, innerHeight - 230)}px`
    document.body.append(tip)
  }

  // Copy messages of Gradio that vanish, such as that an upload is too large, to the page.
  new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach((node) => {
    const toast = node.querySelector?.('[data-testid=toast-body]')
    const notice = document.querySelector('#notice [role=alert]')
    if (toast && notice) notice.replaceChildren(Object.assign(document.createElement('p'), { textContent: toast.innerText }))
  }))).observe(document.documentElement, { childList: true, subtree: true })

  // Files whose upload takes time must not replace a query that was chosen meanwhile.
  let isLatestQuery = true
  const choosers = '#examples [data-index], #map [data-index], #which-one [data-index], #viewer [data-do=query], #search-with-item, #another, #start-over'
  document.addEventListener('click', (event) => { if (event.target.closest(choosers)) isLatestQuery = false }, true)
  for (const chosen of ['change', 'drop', 'paste']) {
    document.addEventListener(chosen, (event) => { if (event.type !== 'change' || event.target.type === 'file') isLatestQuery = true }, true)
  }

  // All files of a dropped file or folder.
  async function filesOf (entry) {
    if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))]
    const reader = entry.createReader()
    const files = []
    for (let batch; (batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;) {
      for (const inner of batch) files.push(...await filesOf(inner))
    }
    return files
  }

  // Gradio's drop zone takes files only: hand it the files of a dropped folder.
  document.addEventListener('drop', async (event) => {
    const input = event.target.closest?.('#upload')?.querySelector('input[type=file]')
    const entries = [...event.dataTransfer?.items ?? []].map((item) => item.webkitGetAsEntry()).filter(Boolean)
    if (!input || !entries.some((entry) => entry.isDirectory)) return
    event.preventDefault()
    event.stopPropagation()
    const transfer = new DataTransfer()
    for (const entry of entries) (await filesOf(entry)).forEach((file) => transfer.items.add(file))
    input.files = transfer.files
    input.dispatchEvent(new Event('change', { bubbles: true }))
  }, true)

  // One of the two pictures. Voxels are counted along D, H and W from 0, as in the scan on the server.
  class Pane {
    constructor (figure, viewer) {
      this.figure = figure
      this.canvas = figure.querySelector('canvas')
      this.slider = figure.querySelector('input')
      this.output = figure.querySelector('output')
      this.viewer = viewer
      this.nv = new window.niivue.Niivue({
        backColor: [0, 0, 0, 1], isRadiologicalConvention: true, dragAndDropEnabled: false, crosshairColor: [0.2, 0.9, 1, 0.8],
        crosshairWidthUnit: 'mm', crosshairGap: 10, multiplanarShowRender: 0, show3Dcrosshair: false, loadingText: '', logLevel: 'error',
        isForceMouseClickToVoxelCenters: true, rulerColor: [1, 0.85, 0.2, 1], selectionBoxColor: [0.2, 0.9, 1, 0.25],
        fontMinPx: 16, fontColor: [1, 1, 1, 1], showAllOrientationMarkers: true, multiplanarPadPixels: 20, sagittalNoseLeft: true
      })
      const { nv } = this
      nv.drawCircle = (box, colour) => nv.drawRect(box, colour) // a region is a box, NiiVue draws an ellipse
      const { drawScene, drawTextLeft, drawTextAbove } = nv
      nv.drawScene = () => { drawScene.call(nv); this.drawRegion() }
      // NiiVue draws the letters at the right and at the bottom partly outside of the picture
      nv.drawTextLeft = ([x, y], ...text) => drawTextLeft.call(nv, [x - 6, y], ...text)
      nv.drawTextAbove = ([x, y], ...text) => drawTextAbove.call(nv, [x, y - 6], ...text)
      this.tool('crosshair')
      this.nv.addColormap('m3ret', HEAT)
      this.nv.onLocationChange = (location) => this.moved(location)
      this.nv.onDragRelease = (drag) => this.dragged(drag)
      this.slider.addEventListener('input', () => this.go(Number(this.slider.value) - 1))
      const frame = figure.querySelector('.frame')
      frame.addEventListener('wheel', (event) => this.wheel(event), { capture: true, passive: false })
      frame.addEventListener('keydown', (event) => { this.key(event); event.stopPropagation() }, { capture: true })
      frame.addEventListener('keyup', (event) => event.stopPropagation(), { capture: true })
      frame.addEventListener('pointermove', (event) => this.hover(event))
    }

    async show (pane) {
      this.pane = pane
      const text = (tag, words) => Object.assign(document.createElement(tag), { textContent: words })
      this.figure.querySelector('figcaption').replaceChildren(text('b', pane.name), text('span', pane.facts))
      this.canvas.setAttribute('aria-label', `${pane.name}. Arrow keys change the slice.`)
      const slices = pane.shape[0]
      this.slider.max = slices
      this.slider.parentElement.hidden = slices < 2
      this.unit = pane.volume ? 'Slice' : 'Frame'
      this.slider.previousElementSibling.textContent = this.unit
      const { nv } = this
      if (!nv.canvas) await nv.attachToCanvas(this.canvas)
      const { NVImage } = window.niivue
      let volume = nv.volumes[0]
      const isNew = this.url !== pane.url
      if (isNew) {
        const answer = await fetch(pane.url)
        if (!answer.ok) throw new Error(await answer.text())
        volume = await NVImage.loadFromUrl({ url: await answer.arrayBuffer(), name: 'scan.nii', colormap: 'gray' })
      }
      const heat = await NVImage.loadFromBase64({ base64: pane.heat, name: 'heat.nii.gz', colormap: 'm3ret', opacity: this.viewer.opacity })
      // type 1 makes values below cal_min translucent: their opacity is (value / cal_min)², so that it grows with the confidence
      Object.assign(heat, { cal_min: 254, cal_max: 255, colormapType: 1 })
      if (isNew) {
        Object.assign(volume, this.window())
        nv.clearAllMeasurements()
        nv.setIsOrientationTextVisible(pane.oriented)
        nv.opts.showMeasureUnits = pane.mm
        nv.scene.pan2Dxyzmm = [0, 0, 0, 1]
        this.url = pane.url
      }
      // both volumes at once: each update of the graphics memory takes as long as the upload of both
      Object.assign(nv, { volumes: [volume, heat], back: volume, overlays: [heat] })
      nv.updateGLVolume()
      const { dims, pixDims } = volume.hdr // of W, H and D
      if (isNew) nv.setCrosshairWidth(0.004 * Math.max(dims[1] * pixDims[1], dims[2] * pixDims[2]))
      this.planes()
      this.best()
    }

    // What dragging with the left button does.
    tool (name) {
      const { DRAG_MODE } = window.niivue
      this.nv.setMouseEventConfig({ leftButton: { primary: DRAG_MODE[name] }, rightButton: DRAG_MODE.windowing, centerButton: DRAG_MODE.pan })
    }

    // One slice in the plane of the scan, or three planes.
    planes () {
      const { nv, pane } = this
      const one = { axial: nv.sliceTypeAxial, coronal: nv.sliceTypeCoronal, sagittal: nv.sliceTypeSagittal }[pane.plane]
      nv.setSliceType(this.viewer.planes && pane.volume ? nv.sliceTypeMultiplanar : one)
    }

    // Range of values from black to white.
    window () {
      const { unit, max } = this.pane
      const [level, width] = unit === 'HU' ? this.viewer.window : [max / 2, max]
      return { cal_min: level - width / 2, cal_max: level + width / 2 }
    }

    // fraction of the scan along the axis of D, H or W, in RAS, and back
    fraction (axis, voxel) {
      const size = Math.ceil(this.pane.shape[axis] / (axis ? this.pane.stride : 1))
      const at = (voxel + 0.5) / size
      return this.pane.axes[axis][1] > 0 ? at : 1 - at
    }

    voxel (axis, fraction) {
      const size = this.pane.shape[axis]
      const at = this.pane.axes[axis][1] > 0 ? fraction : 1 - fraction
      return Math.min(size - 1, Math.max(0, Math.floor(at * size)))
    }

    get slice () { return this.voxel(0, this.nv.scene.crosshairPos[this.pane.axes[0][0]]) }

    // Outline the region of the search on each of its slices. Its ends are the edges of voxels.
    drawRegion () {
      const { nv, pane } = this
      const [slices, ...ends] = this === this.viewer.panes?.[0] ? this.viewer.props.value?.box ?? [] : []
      if (!slices || !nv.volumes.length || this.viewer.planes || this.slice < slices[0] || this.slice >= slices[1]) return
      const size = [nv.canvas.height, nv.canvas.width]
      const [first, last] = [[0, 0], [size[1], size[0]]].map(([x, y]) => nv.screenXY2TextureFrac(x, y, 0, false))
      const [[y, bottom], [x, right]] = ends.map((edges, index) => {
        const [world, direction] = pane.axes[index + 1]
        return edges.map((edge) => edge / pane.shape[index + 1]).map((share) => direction > 0 ? share : 1 - share)
          .map((share) => (share - first[world]) / (last[world] - first[world]) * size[index]).sort((one, other) => one - other)
      })
      const [width, height] = [right - x, bottom - y]
      const line = 2 * nv.uiData.dpr
      for (const side of [[x, y, width, line], [x, y + height - line, width, line], [x, y, line, height], [x + width - line, y, line, height]]) {
        nv.drawRect(side, [1, 0.85, 0.2, 1])
      }
    }

    go (slice, isLinked = false) {
      const position = this.nv.scene.crosshairPos
      slice = Math.min(this.pane.shape[0] - 1, Math.max(0, slice))
      position[this.pane.axes[0][0]] = this.fraction(0, slice)
      this.nv.drawScene()
      this.report(isLinked)
    }

    best () {
      this.anchor = this.pane.voxel[0]
      this.pane.voxel.forEach((voxel, axis) => { this.nv.scene.crosshairPos[this.pane.axes[axis][0]] = this.fraction(axis, voxel) })
      this.nv.drawScene()
      this.report(true)
    }

    moved () { this.report(false) }

    // Show where the crosshair is, and let the other scan follow.
    report (isLinked) {
      const { nv, pane } = this
      if (!nv.volumes.length) return
      const { slice } = this
      this.slider.value = slice + 1
      this.slider.setAttribute('aria-valuetext', `${slice + 1} of ${pane.shape[0]}`)
      const volume = nv.volumes[0]
      const voxel = nv.frac2vox(nv.scene.crosshairPos)
      this.showValue(volume.getValue(...voxel), 'at the cross')
      this.figure.dataset.slice = slice
      if (!isLinked) this.viewer.follow(this)
    }

    // Show the slice and a value of it.
    showValue (value, where) {
      const { unit, max, shape } = this.pane
      const parts = shape[0] > 1 ? [`${this.unit} ${this.slice + 1} of ${shape[0]}`] : []
      if (unit === 'HU') parts.push(`${Math.round(value)} HU ${where}`)
      else if (this.nv.volumes[0].hdr.datatypeCode !== 128) parts.push(`Brightness ${(100 * value / max).toFixed(0)}% ${where}`)
      this.output.textContent = parts.join(' · ') // a colour has no value
    }

    // Show the value under the cursor.
    hover (event) {
      const { nv } = this
      if (!nv.volumes.length || event.buttons) return
      const box = this.canvas.getBoundingClientRect()
      const scale = nv.uiData.dpr
      const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]
      const tile = nv.tileIndex(x, y)
      const at = tile < 0 ? [-1] : nv.screenXY2TextureFrac(x, y, tile, false)
      if (at[0] < 0) return
      this.showValue(nv.volumes[0].getValue(...nv.frac2vox(at)), 'under the cursor')
    }

    wheel (event) {
      if (this.viewer.planes && !event.ctrlKey) return
      event.stopPropagation()
      if (event.ctrlKey || event.metaKey) {
        event.preventDefault()
        this.zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1)
      } else if (this.pane?.shape[0] > 1) {
        event.preventDefault()
        this.go(this.slice + Math.sign(event.deltaY))
      }
    }

    zoom (factor) {
      const [x, y, z, zoom] = this.nv.scene.pan2Dxyzmm
      this.nv.setPan2Dxyzmm([x, y, z, Math.min(20, Math.max(0.5, zoom * factor))])
    }

    key (event) {
      const step = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key]
      if (step && this.pane) this.go(this.slice + step)
      else if (event.key === 'Home') this.go(0)
      else if (event.key === 'End') this.go(this.pane.shape[0])
      else if (event.key === '+' || event.key === '=') this.zoom(1.2)
      else if (event.key === '-') this.zoom(1 / 1.2)
      else if (!this.viewer.key(event)) return
      event.preventDefault()
    }

    dragged (drag) {
      if (this.viewer.tool !== 'roiSelection' || this !== this.viewer.panes[0]) return
      const ends = [1, 2].flatMap((axis) => {
        const world = this.pane.axes[axis][0]
        return [drag.fracStart[world], drag.fracEnd[world]].map((fraction) => this.voxel(axis, fraction))
      })
      if (ends[0] !== ends[1] && ends[2] !== ends[3]) this.viewer.search([this.slice, ...ends])
    }
  }

  class Viewer {
    constructor (element, props, trigger) {
      Object.assign(this, { props, trigger, opacity: 0.7, tool: 'crosshair', planes: false, link: true, window: [40, 400] })
      this.section = element.querySelector('#viewer')
      this.message = this.section.querySelector('.message')
      this.section.addEventListener('click', (event) => this.do(event.target.closest('[data-do]')?.dataset.do))
      this.section.addEventListener('input', (event) => this.set(event.target.dataset.set, event.target))
      this.section.addEventListener('keydown', (event) => { if (event.target.tagName !== 'SELECT') this.key(event) })
    }

    async open () {
      const view = this.props.value
      if (!view?.panes) { this.section.hidden = true; return }
      const wasHidden = this.section.hidden
      this.section.hidden = false
      this.section.dataset.state = 'loading'
      this.message.textContent = 'Loading the scans…'
      if (wasHidden) {
        this.section.scrollIntoView({ behavior: smooth(), block: 'start' })
        this.section.focus({ preventScroll: true })
      }
      try {
        if (!document.createElement('canvas').getContext('webgl2')) throw new Error('This browser cannot draw scans: it has no WebGL 2. Use a current browser.')
        await (loading ??= wait(NIIVUE))
        this.panes ??= [...this.section.querySelectorAll('figure')].map((figure) => new Pane(figure, this))
        await Promise.all(this.panes.map((pane, index) => pane.show(view.panes[index])))
        if (view !== this.props.value) return // another result was opened meanwhile
        const isCt = view.panes.map((pane) => pane.unit === 'HU')
        this.section.querySelector('[data-for=ct]').hidden = !isCt.includes(true)
        this.section.querySelector('[data-for=slices]').hidden = !view.panes.every((pane) => pane.shape[0] > 1)
        this.section.querySelector('[data-for=volume]').hidden = !view.panes.some((pane) => pane.volume)
        const at = view.items.indexOf(view.item)
        this.section.querySelector('[data-do=previous]').disabled = at === 0
        this.section.querySelector('[data-do=next]').disabled = at === view.items.length - 1
        this.section.querySelector('[data-do=whole]').hidden = !view.region
        this.message.textContent = view.region || 'Colours show where the model sees the same structures. They are often wrong.'
        this.section.dataset.state = 'ready'
      } catch (error) {
        console.error(error)
        this.message.textContent = error.message
        this.section.dataset.state = 'failed'
      }
    }

    // Move the other scan by the same distance, or the same share of its frames, from where the two match best.
    follow (pane) {
      const other = this.panes.find((one) => one !== pane)
      if (!this.link || !other.pane || pane.pane.shape[0] < 2) return
      const [from, to] = [pane.pane, other.pane]
      const ratio = from.volume && to.volume ? from.step / to.step : to.shape[0] / from.shape[0]
      other.go(Math.round(other.anchor + (pane.slice - pane.anchor) * ratio), true)
    }

    search (index) { this.trigger('input', { index, value: null }); this.message.textContent = 'Searching by the region…' }

    do (what) {
      const view = this.props.value
      const next = { previous: -1, next: 1 }[what]
      if (!what || !view?.panes) return
      if (next) {
        const item = view.items[view.items.indexOf(view.item) + next]
        if (item !== undefined) this.trigger('select', { index: item, value: null })
      } else if (what === 'query') this.trigger('submit', { index: view.item, value: null })
      else if (what === 'whole') this.search([0, 0, view.panes[0].shape[1], 0, view.panes[0].shape[2]])
      else if (what === 'best') this.panes.forEach((pane) => pane.best())
      else if (what === 'reset') {
        for (const { nv } of this.panes) {
          nv.clearAllMeasurements()
          nv.setPan2Dxyzmm([0, 0, 0, 1])
        }
        this.set('window')
      } else if (what === 'close') {
        this.section.hidden = true
        opener?.isConnected && opener.focus()
      }
    }

    set (what, node) {
      if (!what || !this.panes) return
      if (what === 'link') {
        this.link = node.checked
        this.panes.forEach((pane) => { pane.anchor = pane.slice })
      }
      if (what === 'heat') this.opacity = node.value / 100
      if (what === 'tool') this.tool = node.value
      if (what === 'planes') this.planes = node.checked
      if (what === 'window' && node) this.window = node.value.split(',').map(Number)
      for (const pane of this.panes) {
        const { nv } = pane
        if (what === 'heat' && nv.volumes.length > 1) nv.setOpacity(1, this.opacity)
        if (what === 'tool') pane.tool(this.tool)
        if (what === 'planes') pane.planes()
        if (what === 'window') {
          Object.assign(nv.volumes[0], pane.window())
          nv.updateGLVolume()
        }
      }
    }

    // Handle a key and return whether it has a meaning.
    key (event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return false
      const what = { b: 'best', r: 'reset', n: 'next', p: 'previous', Escape: 'close' }[event.key]
      if (event.key === 'h') {
        const node = this.section.querySelector('[data-set=heat]')
        node.value = this.opacity ? 0 : 70
        this.set('heat', node)
      } else if (what) this.do(what)
      else return false
      return true
    }
  }

  return {
    clickable,
    isLatestQuery: () => isLatestQuery,
    viewer (element, props, trigger, watch) {
      const viewer = new Viewer(element, props, trigger)
      watch('value', () => viewer.open())
      window.m3ret.panes = () => viewer.panes // for tests
    }
  }
})()
