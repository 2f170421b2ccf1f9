"""Run by formats/published.py with the interpreter that has sae-lens; imports nothing of ours.

    python oracle_published.py WORK

WORK/hub/<owner>/<repository>/… are checkpoints in their published layouts, WORK/requests.json a list of
``{case, loader, repository, folder, overrides, scale, centre}``. For each, sae-lens' own loader of that name reads the
checkpoint (a download becomes a look into WORK/hub), and WORK/answers/<case>.safetensors gets x, what ``encode`` made of
it (f), and what came out (x_hat). ``scale`` is the constant that the registry of sae-lens knows and folds; with
``centre`` the dictionary is given x without its mean, as TransformerLens' centred model would give it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub.utils import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors import safe_open
from safetensors.torch import save_file

TOKENS = 48


def serve_locally(hub):
    class Missing(EntryNotFoundError):
        def __init__(self, path):
            Exception.__init__(self, str(path))

    def download(repo_id, filename, subfolder=None, force_download=False, revision=None):
        path = hub / repo_id / (subfolder or "") / filename
        if not path.exists():
            raise Missing(path)
        return str(path)

    def shapes(repo_id, filename):
        with safe_open(hub / repo_id / filename, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    loaders.hf_hub_download = download
    loaders.get_safetensors_tensor_shapes = shapes


def load(request):
    loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[request["loader"]]

    def with_overrides(cfg_overrides=None, **arguments):
        return loader(cfg_overrides={**(cfg_overrides or {}), **request["overrides"]}, **arguments)

    sae = SAE.from_pretrained(request["repository"], request["folder"], dtype="float32", converter=with_overrides)
    if request["scale"] is not None:
        sae.fold_activation_norm_scaling_factor(request["scale"])
    return sae


@torch.no_grad()
def answer(sae, request, path, generator):
    # Tokens of different size and mean, so that a scale or a centring that is left out shows.
    size = torch.rand(TOKENS, 1, generator=generator) * 4 + 0.2
    x = (torch.randn(TOKENS, sae.cfg.d_in, generator=generator) + 0.7) * size
    heads = 4 if sae.cfg.reshape_activations == "hook_z" else None
    mean = x.mean(dim=-1, keepdim=True) if request["centre"] else torch.zeros(TOKENS, 1)
    given = x - mean if heads is None else x.unflatten(-1, (heads, -1))
    f, out = sae.encode(given), sae(given)
    out = out + mean if heads is None else out.flatten(-2)
    save_file({"x": x, "f": f.contiguous(), "x_hat": out.contiguous()}, path)


def main():
    work = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    serve_locally(work / "hub")
    (work / "answers").mkdir(exist_ok=True)
    for request in json.loads((work / "requests.json").read_text()):
        generator = torch.Generator().manual_seed(len(request["case"]))
        answer(load(request), request, work / "answers" / f"{request['case']}.safetensors", generator)


if __name__ == "__main__":
    main()
