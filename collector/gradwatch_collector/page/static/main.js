/** Shows the view that the page is of. */

import { ApiError } from "./api.js";
import { fill, h } from "./dom.js";
import { showSession } from "./sign_in.js";

const VIEWS = {
  runs: () => import("./runs_view.js"),
  run: () => import("./run_view.js"),
  compare: () => import("./compare_view.js"),
  slos: () => import("./slos_view.js"),
};

const main = document.getElementById("main");
for (const link of document.querySelectorAll(".bar nav a")) {
  const path = link.getAttribute("href");
  if (location.pathname === path || (path === "/" && /^\/(runs|compare)/.test(location.pathname))) {
    link.setAttribute("aria-current", "page");
  }
}

// "/" goes to the search field, as in many tools.
addEventListener("keydown", (event) => {
  const isTyping = event.target instanceof HTMLElement && event.target.matches("input, select, textarea");
  const field = document.querySelector("input[type=search]");
  if (event.key === "/" && !isTyping && field && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    field.focus();
  }
});

try {
  showSession();
  const view = await VIEWS[document.body.dataset.view]();
  await view.show(main);
} catch (error) {
  const words = error instanceof ApiError ? error.message : `This page failed: ${error.message}`;
  fill(main, h("h1", {}, "This page cannot be shown"), h("p", { class: "notice bad", role: "alert" }, words), h("p", {}, h("a", { href: "/" }, "All runs")));
  if (!(error instanceof ApiError)) throw error;
}
