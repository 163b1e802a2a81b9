"""Studies: a method's claims, measured, each by one command that can be interrupted."""

from evenkeel.studies.frame import SCALES as SCALES
from evenkeel.studies.frame import Desk as Desk
from evenkeel.studies.frame import Part as Part
from evenkeel.studies.frame import Study as Study
from evenkeel.studies.frame import run as run

STUDIES = {
    "noise_aware": "evenkeel.studies.noise_aware.study:STUDY",
    "batch_channel": "evenkeel.studies.batch_channel.study:STUDY",
    "equi_norm": "evenkeel.studies.equi_norm.study:STUDY",
    "kalman": "evenkeel.studies.kalman.study:STUDY",
    "hd_memory": "evenkeel.studies.hd_memory.study:STUDY",
    "quaternion": "evenkeel.studies.quaternion.study:STUDY",
    "dense": "evenkeel.studies.dense.study:STUDY",
    "micro_batch": "evenkeel.studies.micro_batch.study:STUDY",
}
"""By name, where each is; a study is imported when it is asked for."""
