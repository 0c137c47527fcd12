// Logs in without leaving the page: a form would send `Origin: null`, which is accepted only where the browser says
// besides that it is the same site, and that it says only of https and of this machine.
//
// `/login#TOKEN`, as the terminal prints it: what follows # is not sent by itself, kept by no log, and taken out of the
// address at once.

const form = document.getElementById("login");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await fetch("/login", { method: "POST", body: new URLSearchParams(new FormData(form)), headers: { accept: "application/json" } });
  if (answer.ok) {
    location.assign("/");
    return;
  }
  const said = await answer.json().catch(() => ({}));
  const why = document.getElementById("why");
  why.textContent = said.error ?? `The server refused it (${answer.status}).`;
  why.hidden = false;
});

function takeToken() {
  const given = location.hash.slice(1);
  if (!given) return;
  history.replaceState(null, "", "/login");
  document.getElementById("token").value = given;
  form.requestSubmit();
}
addEventListener("hashchange", takeToken); // the address was opened in a tab that shows this page already
takeToken();
