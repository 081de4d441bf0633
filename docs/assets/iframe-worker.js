// A page that is opened from a folder may start no worker: there the search runs in a hidden frame.
if (location.protocol === "file:")
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script>var postMessage = (data) => parent.postMessage(data, "*")</script>
        <script src="${url}"></script>`
      this.inside = new Promise((done) => (frame.onload = () => done(frame.contentWindow)))
      addEventListener("message", ({ source, data }) => {
        if (source === frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data }))
      })
      document.body.append(frame)
    }
    async postMessage(data) {
      (await this.inside).dispatchEvent(new MessageEvent("message", { data }))
    }
  }
