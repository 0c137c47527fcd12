// Makes a part of the page look like a newly rendered one, in place: what is the same stays the same element, so that
// focus, selection, open <details> and charts stay.

const KEPT_WHILE_USED = new Set(["INPUT", "TEXTAREA", "SELECT"]);

export function morph(from, to) {
  if (from.nodeType === Node.TEXT_NODE) {
    if (from.data !== to.data) from.data = to.data;
    return;
  }
  if (from.nodeType !== Node.ELEMENT_NODE) return;
  if (KEPT_WHILE_USED.has(from.tagName)) {
    const isUsed = from === document.activeElement || from.dataset.isUsed !== undefined;
    const wasChanged = from.type !== "hidden" && from.type !== "range" && from.value !== from.defaultValue;
    if (isUsed || wasChanged || from.type === "checkbox") return;
    copyAttributes(from, to);
    from.value = to.value;
    return;
  }
  copyAttributes(from, to);
  if (from.dataset.chart !== undefined) return; // drawn by chart.js
  morphChildren(from, to);
}

function copyAttributes(from, to) {
  for (const { name, value } of to.attributes) {
    if (from.getAttribute(name) !== value && !(name === "open" && from.tagName === "DETAILS")) from.setAttribute(name, value);
  }
  for (const { name } of [...from.attributes]) {
    if (!to.hasAttribute(name) && !(name === "open" && from.tagName === "DETAILS") && name !== "disabled") from.removeAttribute(name);
  }
}

function keyOf(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.dataset.key ?? node.id ?? "" : "";
}

function isAlike(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName && keyOf(one) === keyOf(other);
}

function morphChildren(from, to) {
  const keyed = new Map();
  for (const child of from.children) if (keyOf(child)) keyed.set(keyOf(child), child);
  let place = from.firstChild;
  for (const wanted of [...to.childNodes]) {
    const key = keyOf(wanted);
    const known = key ? keyed.get(key) : undefined;
    if (known !== undefined && known !== place && isAlike(known, wanted)) {
      from.insertBefore(known, place);
      morph(known, wanted);
    } else if (place !== null && isAlike(place, wanted)) {
      morph(place, wanted);
      place = place.nextSibling;
    } else {
      from.insertBefore(document.importNode(wanted, true), place);
    }
  }
  while (place !== null) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}
