/** Reading the JSON API. Where a token is asked for, the reader is asked for it, once, and the request is repeated. */

import { signIn } from "./sign_in.js";

/** What went wrong, in a line that says what to do. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const ADVICE = {
  403: "This token may not see that. Sign in with another.",
  404: "There is no such thing here, or it is another team's.",
  429: "This token's limit is reached. Wait a little, or raise its limits.",
  503: "The database is busy or away. This page tries again by itself; the collector's log says more.",
};

let signingIn = null;

/**
 * Read a path of the API. Parameters that are null or empty are left out; lists repeat theirs.
 * @returns {Promise<any>}
 * @throws {ApiError}
 */
export async function read(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "") query.append(name, each);
    }
  }
  const url = query.size ? `${path}?${query}` : path;
  for (;;) {
    const answer = await ask(url, signal);
    if (answer.ok) return answer.json();
    if (answer.status !== 401) throw await refusal(answer);
    signingIn ??= signIn().finally(() => {
      signingIn = null;
    });
    await signingIn;
  }
}

/** What is said of runs that are not there, or not to be seen. */
export function noRun(runIds) {
  return `There is no run ${runIds.join(" and no run ")} here, or it is another team's.`;
}

/** Resolves once nobody is being asked for a token. */
export async function signedIn() {
  await signingIn;
}

/** The path of a run's page, whatever its id. */
export function runPath(runId) {
  return `/runs/${encodeURIComponent(runId)}`;
}

async function ask(url, signal) {
  try {
    // Going back to a page, a browser takes whatever it kept, however old.
    return await fetch(url, { signal, cache: "no-store", headers: { Accept: "application/json" } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The collector does not answer. Is it running? (gradwatch collector serve)");
  }
}

async function refusal(answer) {
  const told = await answer.json().catch(() => ({}));
  return new ApiError(`${ADVICE[answer.status] ?? "The collector refused."} (${told.error ?? answer.status})`, answer.status);
}
