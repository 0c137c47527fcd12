// The live log of the events page: rows that come are put on top. Whatever is in an event is text.

import { Stream } from "/static/live.js";

const MOST_ROWS = 500;

function visible(text) {
  return text.replace(/[\p{C}\p{Z}]/gu, (character) =>
    character === " " || character === "\n" ? character : `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`);
}

function row(event) {
  const made = document.getElementById("event-row").content.firstElementChild.cloneNode(true);
  const [id, time, iteration, type, source, data] = made.children;
  made.dataset.key = made.dataset.event = event.id;
  id.textContent = event.id;
  time.firstChild.dateTime = time.firstChild.title = event.emitted_at;
  time.firstChild.textContent = event.emitted_at.slice(0, 19).replace("T", " ");
  if (event.iteration) {
    iteration.firstChild.href = `/iterations/${event.iteration}`;
    iteration.firstChild.textContent = event.iteration;
  }
  type.firstChild.href = `/events?type=${encodeURIComponent(event.type)}`;
  type.firstChild.textContent = visible(event.type).slice(0, 80);
  source.firstChild.href = `/events?source=${encodeURIComponent(event.source)}`;
  source.firstChild.textContent = visible(event.source).slice(0, 80);
  const [summary, value] = data.firstChild.children;
  summary.textContent = visible(JSON.stringify(event.data).slice(0, 120));
  value.textContent = visible(JSON.stringify(event.data, null, 2).slice(0, 100_000));
  made.classList.add("fresh");
  return made;
}

export function follow(log, onState) {
  const query = new URLSearchParams(location.search);
  const address = new URL("/api/v1/events/stream", location.href);
  for (const name of ["type", "source", "text"]) if (query.get(name)) address.searchParams.set(name, query.get(name));
  const waiting = [];
  const isFollowing = document.getElementById("follow");
  const show = () => {
    if (isFollowing && !isFollowing.checked) return;
    for (const event of waiting.splice(0)) {
      if (!log.querySelector(`[data-event="${event.id}"]`)) log.prepend(row(event));
    }
    while (log.children.length > MOST_ROWS) log.lastElementChild.remove();
    document.getElementById("no-events").hidden = log.children.length > 0;
  };
  isFollowing?.addEventListener("change", show);
  return new Stream(address, {
    event: (event) => {
      waiting.push(event);
      if (waiting.length > MOST_ROWS) waiting.shift();
      show();
    },
    resync: () => location.reload(),
  }, { after: log.dataset.log, onState });
}
