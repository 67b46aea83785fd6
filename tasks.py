"""Operate the deployment: values become words here, a StackError two lines and an exit code.

`invoke --list` is the manual.
"""

from invoke.collection import Collection

from verbs import download, engine, look, make, measure, serve, support, switch

MODULES = (make, download, serve, switch, look, measure, engine, support)

namespace = Collection(
    *(task for module in MODULES for task in Collection.from_module(module).tasks.values())
)
