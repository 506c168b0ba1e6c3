//! What a swap will do, before it is one: the order in which containers stop and start, and the gaps that this makes. The swap
//! itself (`swap.rs`) reads the whole situation at each step; this is what it comes to when nothing goes wrong.

use std::collections::{BTreeMap, BTreeSet};

use crate::data::DataStep;
use crate::phase::Mode;
use crate::record::{Overlap, Plan};
use crate::words::ContainerName;

/// One stage, in the order of time. Containers of one stage stop and start side by side, as far as they do not depend on one
/// another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    Data(DataStep),
    /// The old side's containers that may not overlap.
    StopOld(BTreeSet<ContainerName>),
    StartNew(BTreeSet<ContainerName>),
    /// The new side's probes answer, several times in a row.
    Prove,
    CutOver,
    /// The new side's controller drives from here on.
    HandOver,
    StopOldLate(BTreeSet<ContainerName>),
    StartNewLate(BTreeSet<ContainerName>),
    /// Blue/green: the old side stays warm.
    Confirm,
    /// What is left of the old side stops, and stays for a while.
    Retire(BTreeSet<ContainerName>),
}

/// Whether, and when, neither the old container nor the new one runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gap {
    /// One of them always runs.
    None,
    /// Before the cut-over, until the new side is up.
    Early,
    /// After the cut-over.
    Late,
    /// From before the start of the new side until after the cut-over.
    Long,
}

/// What becomes of one container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// As the new side has it; as the old one had it where it goes.
    pub overlap: Overlap,
    pub is_new: bool,
    pub goes: bool,
    pub gap: Gap,
}

/// The stages from what serves to what is to serve.
pub fn stages(from: Option<&Plan>, to: &Plan, mode: Mode) -> Vec<Stage> {
    let old = |overlap| -> BTreeSet<ContainerName> {
        from.into_iter().flat_map(|from| from.with_overlap(overlap)).cloned().collect()
    };
    let late: BTreeSet<ContainerName> = to.with_overlap(Overlap::StartAfterCutover).cloned().collect();
    let mut stages: Vec<Stage> = to.data.steps.iter().cloned().map(Stage::Data).collect();
    let stops = [(old(Overlap::StopOldFirst), Stage::StopOld as fn(_) -> _)];
    stages.extend(stops.into_iter().filter(|(names, _)| !names.is_empty()).map(|(names, stage)| stage(names)));
    stages.push(Stage::StartNew(to.early().cloned().collect()));
    stages.extend([Stage::Prove, Stage::CutOver]);
    if to.has_controller() {
        stages.push(Stage::HandOver);
    }
    let changes = [
        (old(Overlap::StartAfterCutover), Stage::StopOldLate as fn(_) -> _),
        (late, Stage::StartNewLate as fn(_) -> _),
    ];
    stages.extend(changes.into_iter().filter(|(names, _)| !names.is_empty()).map(|(names, stage)| stage(names)));
    if mode == Mode::BlueGreen && from.is_some() {
        stages.push(Stage::Confirm);
    }
    let rest = old(Overlap::Allowed);
    if !rest.is_empty() {
        stages.push(Stage::Retire(rest));
    }
    stages
}

/// What becomes of each container, old and new.
pub fn fates(from: Option<&Plan>, to: &Plan) -> BTreeMap<ContainerName, Fate> {
    let was = |name: &ContainerName| from.and_then(|from| from.containers.get(name)).map(|plan| plan.overlap);
    let mut fates: BTreeMap<ContainerName, Fate> = BTreeMap::new();
    for (name, plan) in &to.containers {
        let before = was(name);
        let gap = before.map_or(Gap::None, |before| gap(before, plan.overlap));
        fates.insert(name.clone(), Fate { overlap: plan.overlap, is_new: before.is_none(), goes: false, gap });
    }
    for (name, plan) in from.into_iter().flat_map(|from| &from.containers) {
        let gone = Fate { overlap: plan.overlap, is_new: false, goes: true, gap: Gap::None };
        fates.entry(name.clone()).or_insert(gone);
    }
    fates
}

/// The old side stops by its own rule and the new one starts by its own: a release of the operator's may change between the two.
fn gap(before: Overlap, after: Overlap) -> Gap {
    match (before, after) {
        (Overlap::Allowed, Overlap::Allowed | Overlap::StopOldFirst | Overlap::StartAfterCutover)
        | (Overlap::StartAfterCutover, Overlap::Allowed | Overlap::StopOldFirst) => Gap::None,
        (Overlap::StopOldFirst, Overlap::Allowed | Overlap::StopOldFirst) => Gap::Early,
        (Overlap::StartAfterCutover, Overlap::StartAfterCutover) => Gap::Late,
        (Overlap::StopOldFirst, Overlap::StartAfterCutover) => Gap::Long,
    }
}
