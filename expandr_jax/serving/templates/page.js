// Sends a new document as JSON, which no form can; all else on the page works without this.
"use strict";
const form = document.getElementById("add");
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const said = document.getElementById("said");
  const field = (name) => document.getElementById(name).value;
  said.textContent = "Adding …";
  try {
    const answer = await fetch(form.dataset.path, {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({documents: [{id: field("id"), text: field("text")}]}),
    });
    const body = await answer.json();
    said.textContent = !answer.ok ? body.error.message
      : body.added ? "Added; it is found from now on." : "Replaced; it is found from now on.";
  } catch (error) {
    said.textContent = "The service did not answer.";
  }
});
