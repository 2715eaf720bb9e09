"""A recipe for tests: the same small run on four meshes of four devices, one after the other."""

from pathlib import Path

from configs import quickstart

MESHES = ((4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1))


def get_config():
    """A run on the first of the meshes."""
    return on(quickstart.get_config("dpo"), MESHES[0])


def get_stages(config, workdir):
    """The runs on the other ones."""
    name = "x".join
    return [
        (on(config, mesh), str(Path(workdir).with_name(name(map(str, mesh)))))
        for mesh in MESHES[1:]
    ]


def on(config, mesh):
    """The config with this mesh."""
    config = config.copy_and_resolve_references()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    return config
