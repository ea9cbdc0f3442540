/** Keeping a page up to date: server-sent events say what changed, while somebody looks. */

import { signedIn } from "./api.js";
import { fill, h } from "./dom.js";

// The browser's own reconnecting gives up where it is refused.
const AGAIN_MS = 5_000;

let waiting = null;

/** Try again after a while what failed; null for no longer. A page has one such thing. */
export function again(action) {
  clearTimeout(waiting);
  waiting = action === null ? null : setTimeout(action, AGAIN_MS);
}

/**
 * Call `onChange` with what changed, and with `{missed: true}` when something may have been missed: when it begins, too,
 * since the page was read. Of one run if `runId` is given. Browsers allow few connections to one host: a hidden page
 * has none.
 */
export function follow(onChange, runId = null) {
  const path = runId === null ? "/events" : `/events?${new URLSearchParams({ run: runId })}`;
  let source = null;
  let timer = null;

  function start() {
    if (source !== null || document.hidden) return;
    source = new EventSource(path);
    source.addEventListener("open", () => {
      show("live");
      onChange({ missed: true });
    });
    source.addEventListener("changes", (event) => onChange(JSON.parse(event.data)));
    source.addEventListener("error", () => {
      show("waiting");
      if (source?.readyState !== EventSource.CLOSED) return;
      stop();
      // It does not say why: whatever is read now does, and asks for a token that is no longer valid.
      onChange({ missed: true });
      timer = setTimeout(() => signedIn().then(start), AGAIN_MS);
    });
  }

  function stop() {
    clearTimeout(timer);
    source?.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : start()));
  // A page that the browser keeps for going back would keep its connection.
  addEventListener("pagehide", stop);
  addEventListener("pageshow", start);
  start();
}

/**
 * Return a function that calls `action` soon, and never again before the last call has ended and been left alone for
 * a while: longer where it takes long.
 */
export function calmly(action, leastMs = 1_000) {
  let isBusy = false;
  let isWanted = false;
  return async function ask() {
    isWanted = true;
    if (isBusy) return;
    isBusy = true;
    while (isWanted) {
      isWanted = false;
      const began = performance.now();
      // What fails, fails here as it would where it was called from, and is asked for again.
      await action().catch(reportError);
      const took = performance.now() - began;
      await new Promise((resolve) => setTimeout(resolve, Math.max(leastMs, 4 * took)));
    }
    isBusy = false;
  };
}

function show(state) {
  const [glyph, words] = state === "live" ? ["●", "live"] : ["○", "reconnecting…"];
  const place = document.getElementById("live");
  if (place.dataset.state === state) return;
  place.dataset.state = state;
  fill(place, h("span", { "aria-hidden": "true" }, `${glyph} `), words);
}
