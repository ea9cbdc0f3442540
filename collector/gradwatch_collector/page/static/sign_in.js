/** Asking for a token. The browser keeps it in a cookie that scripts cannot read. */

import { h, fill } from "./dom.js";

const PATH = "/session";

/** Ask until there is a token that may read; resolves when there is. */
export function signIn() {
  return new Promise((resolve) => {
    const field = h("input", {
      id: "token", name: "token", type: "password", required: true, autocomplete: "current-password",
      placeholder: "gw_…", "aria-describedby": "token-help token-problem",
    });
    const problem = h("p", { id: "token-problem", class: "failed small", role: "alert" });
    const dialog = h(
      "dialog",
      { "aria-labelledby": "sign-in-title", cancel: (event) => event.preventDefault() },
      h(
        "form",
        {
          submit: async (event) => {
            event.preventDefault();
            fill(problem);
            const refused = await send(field.value);
            if (refused) {
              fill(problem, refused);
              field.select();
              return;
            }
            dialog.close();
            dialog.remove();
            showSession();
            resolve();
          },
        },
        h("h2", { id: "sign-in-title" }, "Sign in"),
        h("p", { id: "token-help", class: "soft small" },
          "This collector asks for a token that may read. Whoever runs it makes one with ",
          h("code", {}, "gradwatch token create NAME --role read"), "."),
        h("label", { for: "token" }, "Token"),
        field,
        problem,
        h("button", { type: "submit", class: "primary" }, "Sign in"),
      ),
    );
    document.body.append(dialog);
    dialog.showModal();
    field.focus();
  });
}

/** Show in the bar who is signed in, and how to sign out. */
export async function showSession() {
  const place = document.getElementById("session");
  const answer = await fetch(PATH).catch(() => null);
  const session = answer?.ok ? await answer.json() : {};
  if (!session.name) {
    fill(place);
    return;
  }
  const whose = session.team ? `${session.name}, team ${session.team}` : session.name;
  const leave = async () => {
    await fetch(PATH, { method: "DELETE" });
    location.assign("/");
  };
  fill(place, `${whose} `, h("button", { type: "button", click: leave }, "Sign out"));
}

async function send(token) {
  try {
    const answer = await fetch(PATH, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token: token.trim() }),
    });
    if (answer.ok) return null;
    if (answer.status === 401) return "That token is not known, or no longer valid.";
    if (answer.status === 403) return "That token may not read. One that may has the role read.";
    return (await answer.json().catch(() => ({}))).error ?? `The collector refused (${answer.status}).`;
  } catch {
    return "The collector does not answer. Is it running?";
  }
}
