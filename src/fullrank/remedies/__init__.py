"""Remedies: what each addresses, where it acts, how exact it is; applied to a model, proved and undone."""

from fullrank.remedies.applying.asked import Asked, Prescription, asked_for
from fullrank.remedies.applying.record import repairs_in
from fullrank.remedies.applying.repair import Applied, Repair, repaired
from fullrank.remedies.catalogue import CATALOGUE, remedy_of
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Seen, Site
from fullrank.remedies.penalty import Penalty, penalty_of
from fullrank.remedies.remedy import Remedy, remedy
from fullrank.remedies.tokens.token_macs import counted_macs
from fullrank.remedies.tokens.token_schedule import token_course, token_macs

__all__ = [
    "CATALOGUE",
    "Applied",
    "Asked",
    "Parameter",
    "Patient",
    "Penalty",
    "Prescription",
    "Remedy",
    "Repair",
    "Seen",
    "Site",
    "asked_for",
    "counted_macs",
    "penalty_of",
    "remedy",
    "remedy_of",
    "repaired",
    "repairs_in",
    "token_course",
    "token_macs",
]
