/** Elements made from plain values. Texts are telemetry's own, and are only ever set as text. */

/**
 * Make an element. Properties that are functions listen, `class` and `aria-*` are attributes; null is left out.
 * @param {string} tag
 * @param {Object<string, any>} [properties]
 * @param {...(Node|string|number|null|undefined|Array)} children
 * @returns {HTMLElement}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Put these in the place of all that an element has. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
}

/** A table that scrolls by itself where it is too wide, by the keyboard, too. */
export function table(caption, headings, rows, className = "") {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      { class: className },
      h("caption", { class: "hidden-label" }, caption),
      h("thead", {}, h("tr", {}, headings.map((heading) => h("th", { scope: "col" }, heading)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell ?? "–"))))),
    ),
  );
}

/** Facts beside their names: an array of [name, value]; those that are not known are left out. */
export function facts(pairs, className) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  if (className === "facts") {
    return h("dl", { class: className }, known.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }
  return h("dl", { class: className }, known.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}
