"""Where a fitted vector goes: a library's folder, or a running server's library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from editserver.library import Listing, Vector, VectorLibrary, parse_vector
from interventions.errors import InterventionError
from interventions.wording import choices

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Folder:
    """A library's folder; servers started with the same ``--library`` see it at once."""

    path: Path
    url: str | None = None

    def __str__(self) -> str:
        return str(self.path)

    def check(self) -> None:
        """Raise ``invalid_artifact`` if nothing can be written there."""
        if self.path.exists() and not self.path.is_dir():
            raise InterventionError("invalid_artifact", f"--library {self.path}: is not a folder")

    def get(self, name: str) -> Vector | None:
        """What ``name`` stands for now."""
        try:
            return VectorLibrary(self.path).get(name)
        except InterventionError:
            return None

    def put(self, name: str, vector: Vector) -> Listing:
        """Store it."""
        (layer,) = vector.layers
        # The same checks as a server's: what is stored here must be what a server would have taken.
        checked = parse_vector(vector.body(), len(vector.layers[layer]), layer + 1)
        return VectorLibrary(self.path).put(name, checked)

    def warning(self, layer: int) -> str | None:
        """What must be done before a request can use a vector of ``layer``."""
        return (
            f"The server must arm layer {layer}: editserver serve … --arm-layers {layer} (the demo arms 10, 15 and 20)."
        )


@dataclass(frozen=True)
class Server:
    """The library of a running server."""

    url: str
    api_key: str | None = None

    def __str__(self) -> str:
        return self.url

    def check(self) -> None:
        """Raise ``invalid_artifact`` if no editserver answers there: before a long fit, not after."""
        self._capabilities()

    def get(self, name: str) -> Vector | None:
        """What ``name`` stands for now."""
        response = self._send("GET", f"/v1/library/vectors/{name}")
        if response.status_code != httpx.codes.OK:
            return None
        body = response.json()["body"]
        rows = {int(layer): row for layer, row in body["layers"].items()}
        return parse_vector(body, len(next(iter(rows.values()))), max(rows) + 1)

    def put(self, name: str, vector: Vector) -> Listing:
        """Store it; raises the server's own refusal."""
        response = self._send("PUT", f"/v1/library/vectors/{name}", json=vector.body())
        if response.status_code != httpx.codes.OK:
            raise InterventionError("invalid_artifact", f"{self.url} refused the vector: {_reason(response)}")
        answer = response.json()
        return Listing(answer["name"], answer["version"], answer["digest"])

    def warning(self, layer: int) -> str | None:
        """A layer that the server has not armed."""
        armed = self._capabilities().get("armed_layers", [])
        if layer in armed:
            return None
        return (
            f"The server arms {choices(armed)}: restart it with --arm-layers {layer} before a request uses this vector."
        )

    def _capabilities(self) -> dict[str, Any]:
        response = self._send("GET", "/v1/capabilities")
        if response.status_code != httpx.codes.OK:
            message = f"--url {self.url}: GET /v1/capabilities answers {_reason(response)}; is it an editserver?"
            raise InterventionError("invalid_artifact", message)
        answer: dict[str, Any] = response.json()
        return answer

    def _send(self, method: str, path: str, json: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None
        try:
            return httpx.request(method, self.url.rstrip("/") + path, json=json, headers=headers, timeout=_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise InterventionError("invalid_artifact", f"--url {self.url}: cannot be reached ({error})") from error


Store = Folder | Server


def _reason(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return str(response.status_code)
