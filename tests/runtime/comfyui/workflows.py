"""The example workflows, and what ComfyUI's page sends of one."""

from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).parents[3] / "runtime" / "comfyui" / "workflows"


def prompt_from_workflow(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """What the page makes of a workflow: inputs by name, from links and widgets."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        info = nodes[node["type"]]["input"]
        linked = {x["name"]: links[x["link"]] for x in node["inputs"] if x["link"]}
        sockets = {x["name"] for x in node["inputs"]}
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for name, (_kind, *more) in (info["required"] | info.get("optional", {})).items():
            if name in linked:
                inputs[name] = linked[name]
            elif name not in sockets:
                inputs[name] = next(values)
                options = more[0] if more else {}
                if options.get("control_after_generate") or options.get("image_upload"):
                    next(values)
        assert list(values) == [], f"{node['type']} has widgets that the node does not"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
