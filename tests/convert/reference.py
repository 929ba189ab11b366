"""Draws latents by the pipelines of the pi-Flow release, in a process of its own.

    python reference.py CHECKOUT JOB.json

The release is built on mmcv and a dozen packages that its pipelines do not use; what is not
installed of them is replaced by modules of nothing, and packages that import all of their contents
are entered without doing so.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np

UNUSED = ("mmcv", "mmgen", "imageio", "boto3", "botocore", "lpips", "bs4", "zstandard", "cv2")
ENTERED = ("", "models", "models.architectures", "models.architectures.gmflow", "pipelines")
ENTERED += ("models.architectures.asymflow", "models.architectures.diffusers", "runner")


class _Nothing(type):
    """Classes whose instances, attributes and results decorate whatever comes."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: lambda decorated: decorated


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        accept = {
            "__init__": lambda self, *args, **kwargs: None,
            "__call__": lambda self, decorated: decorated,
            "__getattr__": lambda self, name: getattr(type(self), name),
        }
        return _Nothing(name, (), accept)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def pipelines(checkout: Path) -> dict:
    """The release's pipelines by network, and its scheduler."""
    sys.meta_path.append(_Finder())
    sys.path.insert(0, str(checkout))
    for name in ENTERED:
        full = f"lakonlab.{name}".rstrip(".")
        module = types.ModuleType(full)
        module.__path__ = [str(checkout / full.replace(".", "/"))]
        sys.modules[full] = module
    sys.modules["lakonlab.utils.collect_env"] = _Empty("lakonlab.utils.collect_env")
    from lakonlab.models.diffusions.schedulers.flow_map_sde import FlowMapSDEScheduler
    from lakonlab.pipelines.pipeline_piflux import PiFluxPipeline
    from lakonlab.pipelines.pipeline_piflux2 import PiFlux2Pipeline
    from lakonlab.pipelines.pipeline_piqwen import PiQwenImagePipeline

    return {
        "flux": PiFluxPipeline,
        "flux2": PiFlux2Pipeline,
        "qwen_image": PiQwenImagePipeline,
        "scheduler": FlowMapSDEScheduler,
    }


def write_flux2(job: dict) -> None:
    """Writes a base and an adapter of FLUX.2 with random numbers, as the release exports them."""
    import diffusers
    import torch
    from lakonlab.models.architectures.gmflow.gmflux2 import _GMFlux2Transformer2DModel
    from peft import LoraConfig
    from safetensors.torch import save_file

    torch.manual_seed(0)
    options = {"num_gaussians": 8, "logstd_inner_dim": 24, "logweights_channels": 4}
    base = diffusers.Flux2Transformer2DModel(**job["write"])
    student = _GMFlux2Transformer2DModel(**job["write"], **options)
    config = dict(student.config) | {"_class_name": "GMFlux2Transformer2DModel"}
    student.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=job["targets"]))
    for module in (base, student):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 0, 0.15)
    base.save_pretrained(job["base"])
    names = {name: name.replace(".default.", ".") for name in student.state_dict()}
    trained = {
        names[name]: tensor.contiguous()
        for name, tensor in student.state_dict().items()
        if "lora" in name or name.startswith(("proj_out", "norm_out"))
    }
    folder = Path(job["adapter"])
    folder.mkdir()
    save_file(trained, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, default=list))


def draw(checkout: Path, job: dict) -> None:
    """Makes the latents of a job and writes them."""
    import diffusers
    import torch
    from safetensors import safe_open

    found = pipelines(checkout)
    if "write" in job:
        write_flux2(job)
    arrays = {name: torch.from_numpy(a) for name, a in np.load(job["inputs"]).items()}
    network = {
        "flux": diffusers.FluxTransformer2DModel,
        "flux2": diffusers.Flux2Transformer2DModel,
        "qwen_image": diffusers.QwenImageTransformer2DModel,
    }[job["network"]]
    transformer = network.from_pretrained(job["base"], torch_dtype=getattr(torch, job["dtype"]))
    scheduler = found["scheduler"](
        shift=job["shift"], final_step_size_scale=job["final_step_size_scale"]
    )
    # What the policies of its later versions read, and the pipelines' scheduler lacks.
    scheduler.num_timesteps = scheduler.config.num_train_timesteps
    empty = ["vae", "text_encoder", "tokenizer"]
    empty += ["text_encoder_2", "tokenizer_2"] if job["network"] == "flux" else []
    with safe_open(f"{job['adapter']}/diffusion_pytorch_model.safetensors", "pt") as file:
        policy = json.loads((file.metadata() or {}).get("policy_config", '{"type": "GMFlow"}'))
    pipeline = found[job["network"]](
        scheduler=scheduler,
        transformer=transformer,
        policy_type=policy.pop("type"),
        policy_kwargs=policy,
        **dict.fromkeys(empty),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_piflow_adapter(job["adapter"], target_module_name="transformer")
    noise = arrays["noise"].permute(0, 3, 1, 2)
    positions, drawn = torch.arange(arrays["text"].shape[1])[None], []
    for i in range(len(noise)):  # a batch of several is more than the release's pipelines take
        part = slice(i, i + 1)
        text = {"prompt_embeds": arrays["text"][part].to(transformer.dtype)}
        if job["network"] == "flux":
            text["pooled_prompt_embeds"] = arrays["pooled"][part].to(transformer.dtype)
        elif job["network"] == "qwen_image":
            text["prompt_embeds_mask"] = (positions < arrays["text_length"][part, None]).long()
        _, channels, height, width = noise.shape
        patched = job["network"] == "flux2"
        if patched:  # its latents are patches in their places
            latents = pipeline._patchify_latents(noise[part])
        else:
            latents = pipeline._pack_latents(noise[part], 1, channels, height, width)
        tokens = pipeline(
            latents=latents,
            height=8 * height,
            width=8 * width,
            num_inference_steps=job["nfe"],
            total_substeps=job["substeps"],
            temperature=job["temperature"],
            output_type="latent",
            return_dict=False,
            **text,
        )[0]
        if patched:
            patches = tokens.permute(0, 2, 1).reshape(latents.shape)
            drawn.append(pipeline._unpatchify_latents(patches))
        else:
            drawn.append(pipeline._unpack_latents(tokens, 8 * height, 8 * width, 8))
    np.savez(job["outputs"], x=torch.cat(drawn).float().permute(0, 2, 3, 1).numpy())


if __name__ == "__main__":
    draw(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
