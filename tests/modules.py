"""Files of the repository that are no modules of a package, imported by their paths."""

import importlib.util


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
