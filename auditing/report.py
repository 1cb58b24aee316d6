import json

from auditing.results import as_json


def write(out, groups, left_out, command, date):
    out.mkdir(parents=True, exist_ok=True)
    (out / "audit.json").write_text(json.dumps(as_json(groups, left_out, command, date), indent=1))
    return {}
