// Shows a token once; the server answers with a session that scripts cannot see.

const problem = document.getElementById("problem");

document.getElementById("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  const token = document.getElementById("token").value;
  const answer = await fetch("/login", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ token }),
  });
  if (answer.ok) {
    location.replace("/");
  } else {
    const found = await answer.json().catch(() => ({}));
    problem.textContent = found.error || `The server answered ${answer.status}.`;
  }
});
