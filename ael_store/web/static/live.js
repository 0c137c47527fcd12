// A stream of the server that is open while the page is looked at. A browser allows few connections to one server, so
// a page in the background closes its own, and asks for what it missed when it is looked at again.

export class Stream {
  constructor(address, handlers, { after = null, onState }) {
    Object.assign(this, { address, handlers, after, onState, source: null, retry: null });
    document.addEventListener("visibilitychange", () => (document.hidden ? this.close() : this.open()));
    addEventListener("pagehide", () => this.close());
    addEventListener("pageshow", () => this.open());
    this.open();
  }

  open() {
    if (this.source !== null || document.hidden || this.isEnded) return;
    clearTimeout(this.retry);
    const address = new URL(this.address, location.href);
    if (this.after !== null) address.searchParams.set("after", this.after);
    const source = (this.source = new EventSource(address));
    source.onopen = () => this.onState("live");
    source.onerror = () => {
      this.onState("lost");
      if (source.readyState === EventSource.CLOSED) { // refused; a browser tries again by itself only what broke off
        this.close();
        this.retry = setTimeout(() => this.open(), 3000);
      }
    };
    for (const [name, handle] of Object.entries(this.handlers)) {
      source.addEventListener(name, (message) => {
        if (this.after !== null) this.after = message.lastEventId;
        handle(JSON.parse(message.data));
      });
    }
  }

  close() {
    this.source?.close();
    this.source = null;
  }

  end() {
    this.isEnded = true;
    clearTimeout(this.retry);
    this.close();
  }
}
