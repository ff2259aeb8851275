# Sourced before `ray start` on every node: what `deployments.ingress.prepare` sets, as shell.
# Run from the project's root, with its environment in .venv.
eval "$(.venv/bin/python -c '
import shlex
from deployments import ingress
environ = {}
ingress.prepare(environ)
for name, value in environ.items():
    print(f"export {name}=" + chr(36) + "{" + f"{name}:-{shlex.quote(value)}" + "}")
')"
