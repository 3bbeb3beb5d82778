// Greets over HTTP; with --check it asks itself once and ends.
const express = require("express");
const app = express();
app.get("/", (_, response) => response.json({ greeting: "hello from express", user: process.getuid() }));
const server = app.listen(process.argv.includes("--check") ? 0 : 3000, "127.0.0.1", async () => {
  if (!process.argv.includes("--check")) return;
  const answer = await fetch(`http://127.0.0.1:${server.address().port}/`);
  console.log(JSON.stringify(await answer.json()));
  server.close();
});
