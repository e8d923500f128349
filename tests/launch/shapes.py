"""The published shapes of manifests as far as the launchers use them, and where a manifest differs.

From the fields of JobSet's API (jobset.x-k8s.io/v1alpha2), of Kubernetes' Job and Pod (batch/v1,
core/v1) and of SkyPilot's task. A dict names all known fields, those with a * are required; a list
has one shape for its items; a tuple lists the valid values; a set of types is a map from text to
them.
"""

TEXT_MAP = {str}
METADATA = {"name": str, "labels": TEXT_MAP, "annotations": TEXT_MAP}
POD = {
    "metadata": METADATA,
    "*spec": {
        "restartPolicy": ("Always", "OnFailure", "Never"),
        "terminationGracePeriodSeconds": int,
        "serviceAccountName": str,
        "nodeSelector": TEXT_MAP,
        "*containers": [
            {
                "*name": str,
                "image": str,
                "command": [str],
                "env": [{"*name": str, "value": str}],
                "ports": [{"*containerPort": int}],
                "resources": {"limits": {int, str}, "requests": {int, str}},
                "volumeMounts": [{"*name": str, "*mountPath": str, "readOnly": bool}],
            }
        ],
        "volumes": [{"*name": str, "csi": {"*driver": str, "readOnly": bool, "volumeAttributes": TEXT_MAP}}],
    },
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": ("NonIndexed", "Indexed"),
    "backoffLimit": int,
    "podFailurePolicy": {
        "*rules": [
            {
                "*action": ("FailJob", "FailIndex", "Ignore", "Count"),
                "onExitCodes": {
                    "containerName": str,
                    "*operator": ("In", "NotIn"),
                    "*values": [int],
                },
            }
        ]
    },
    "*template": POD,
}
JOBSET = {
    "*apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "*kind": ("JobSet",),
    "*metadata": METADATA,
    "*spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "*name": str,
                    "*action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                    "onJobFailureReasons": [
                        (
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        )
                    ],
                }
            ],
        },
        "*replicatedJobs": [{"*name": str, "replicas": int, "*template": {"metadata": METADATA, "*spec": JOB}}],
    },
}
SKY_TASK = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "resources": {
        "accelerators": str,
        "use_spot": bool,
        "infra": str,
        "job_recovery": {
            "strategy": str,
            "max_restarts_on_errors": int,
            "recover_on_exit_codes": [int],
        },
    },
    "envs": TEXT_MAP,
    "file_mounts": {"": {"source": str, "name": str, "mode": ("MOUNT", "COPY", "MOUNT_CACHED")}},
    "setup": str,
    "run": str,
}


def differences(value: object, shape: object, at: str = "") -> list[str]:
    """Where the value is not of the shape."""
    if isinstance(shape, tuple):
        return [] if value in shape else [f"{at}: {value!r} is none of {shape}"]
    if isinstance(shape, type):
        return [] if type(value) is shape else [f"{at}: {value!r} is no {shape.__name__}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{at}: {value!r} is no list"]
        return [said for i, item in enumerate(value) for said in differences(item, shape[0], f"{at}[{i}]")]
    if not isinstance(value, dict):
        return [f"{at}: {value!r} is no map"]
    if isinstance(shape, set):
        return [f"{at}.{name}: {item!r}" for name, item in value.items() if type(item) not in shape]
    assert isinstance(shape, dict)
    known = {name.removeprefix("*"): inner for name, inner in shape.items()}
    if "" in known:  # any name
        known = dict.fromkeys(value, known[""])
    found = [f"{at}.{name} is unknown" for name in value if name not in known]
    found += [f"{at}{name} is missing" for name in shape if name.startswith("*") and name[1:] not in value]
    return found + [
        said for name in value if name in known for said in differences(value[name], known[name], f"{at}.{name}")
    ]
