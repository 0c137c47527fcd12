// Makes a page live: it asks for itself again when something was committed, once a second at most and every five at
// least, and takes over what is new in it. Forms that change something are sent without leaving the page.

import { drawAll } from "/static/chart.js";
import { follow } from "/static/events.js";
import { Stream } from "/static/live.js";
import { morph } from "/static/morph.js";

const PAUSE_MS = 1000;
const LONGEST_MS = 5000;
const WORDS = { live: "Live", lost: "Connection lost", past: "Past", static: "Not live" };

const connection = document.getElementById("connection");
const notice = document.getElementById("notice");
let stream = null;
let isAsking = false;
let isWanted = false;
let askedAt = 0;

function showState(state) {
  if (connection.dataset.state === state) return;
  connection.dataset.state = state;
  connection.textContent = WORDS[state];
}

function tell(text, level) {
  notice.textContent = text;
  notice.dataset.level = level;
  notice.hidden = false;
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => (notice.hidden = true), level === "bad" ? 12_000 : 4000);
}

async function refresh() {
  isWanted = true;
  if (isAsking) return;
  isAsking = true;
  try {
    while (isWanted) {
      await new Promise((resolve) => setTimeout(resolve, Math.max(0, askedAt + PAUSE_MS - Date.now())));
      isWanted = false;
      askedAt = Date.now();
      const address = location.href;
      const answer = await fetch(address, { headers: { accept: "text/html" } });
      if (answer.redirected && new URL(answer.url).pathname === "/login") location.assign("/login");
      const text = await answer.text();
      if (location.href !== address) isWanted = true; // the slider was moved meanwhile
      else if (answer.ok) take(text);
      else tell((new DOMParser().parseFromString(text, "text/html").getElementById("why") ?? {}).textContent ?? "The server refused it.", "bad");
    }
  } catch {
    showState("lost");
  } finally {
    isAsking = false;
  }
}

function take(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  const main = fresh.getElementById("main");
  const log = document.getElementById("log");
  if (log !== null) main.querySelector("#log")?.replaceChildren(...[...log.children].map((row) => row.cloneNode(true)));
  morph(document.getElementById("main"), main);
  document.title = fresh.title;
  drawAll();
}

// -- the moment -------------------------------------------------------------------------------------

async function goTo(address) {
  history.replaceState(null, "", address);
  const isPast = new URL(address, location.href).searchParams.has("at");
  document.body.dataset.live = isPast ? "past" : "commits";
  connect();
  askedAt = 0;
  await refresh();
}

function addressAt(at) {
  const address = new URL(location.href);
  if (at === null) address.searchParams.delete("at");
  else address.searchParams.set("at", at);
  return address.href;
}

let sliding;
document.addEventListener("input", (event) => {
  if (event.target.id !== "slider") return;
  event.target.dataset.isUsed = "";
  document.getElementById("moment").value = event.target.value;
  clearTimeout(sliding);
  sliding = setTimeout(() => goTo(addressAt(event.target.value)), 250);
});
document.addEventListener("change", (event) => {
  if (event.target.id === "slider") delete event.target.dataset.isUsed;
});
document.addEventListener("click", (event) => {
  if (event.target.id !== "to-now" || event.metaKey || event.ctrlKey) return;
  event.preventDefault();
  const moment = document.getElementById("moment");
  moment.value = moment.defaultValue; // nobody's any more, so that it follows the loop again
  goTo(addressAt(null));
});

// -- changes ----------------------------------------------------------------------------------------

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (form.dataset.change === undefined) return;
  event.preventDefault();
  if (form.dataset.confirm && !confirm(form.dataset.confirm)) return;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const fields = new URLSearchParams(new FormData(form));
    fields.delete("back");
    const answer = await fetch(form.action, { method: "POST", body: fields, headers: { accept: "application/json" } });
    const said = await answer.json().catch(() => ({}));
    if (answer.ok) tell("Done, and committed.", "good");
    else tell(said.error ?? `The server refused it (${answer.status}).`, "bad");
  } catch {
    tell("The server does not answer.", "bad");
  } finally {
    button.disabled = false;
  }
  askedAt = 0;
  refresh();
});

// -- being live -------------------------------------------------------------------------------------

function connect() {
  const log = document.getElementById("log");
  if (document.body.dataset.live === "past") {
    stream?.end();
    stream = null;
    showState("past");
    return;
  }
  if (stream !== null) return;
  const handlers = { commit: () => refresh() };
  if (log === null) stream = new Stream("/api/v1/stream", handlers, { onState: showState });
  else if (log.dataset.log !== "") stream = follow(log, showState);
}

// A loop that has died commits nothing, and a page that waits for commits would never say so.
setInterval(() => {
  if (!document.hidden && document.body.dataset.live !== "past") refresh();
}, LONGEST_MS);

drawAll();
connect();
