//! Failures that systems of this kind have had, as far as a transition alone keeps them from happening here.
#![allow(clippy::unwrap_used)]

mod support;

use replank_core::event::Event;
use replank_core::image::ImageId;
use replank_core::phase::*;
use replank_core::record::Actor;
use replank_core::transition::{Refused, apply, next};
use replank_core::words::*;
use support::*;

/// Elsewhere it was said when the change was sent, and the old revision did not come up.
#[test]
fn lesson_16_rolled_back_is_said_once_the_restored_side_was_observed() {
    for mode in [Mode::Single, Mode::BlueGreen] {
        assert!(next(&record_in(State::RollingBack, mode), &Event::RolledBack, Millis(5)).is_ok());
        for op in [Op::StartNew, Op::CutOver, Op::Settle] {
            let mut record = record_in(State::RollingBack, mode);
            let Phase::RollingBack(back) = &mut record.phase else { unreachable!() };
            back.swap.ops.get_mut(&op).unwrap().observed_at = None;
            let refused = next(&record, &Event::RolledBack, Millis(5));
            assert!(matches!(refused, Err(Refused::Inconsistent { .. })), "{op:?} was only intended: {refused:?}");
        }
    }
}

/// Elsewhere one component went back alone, and met others of another version.
#[test]
fn lesson_26_a_rollback_takes_every_component_of_the_release_along() {
    let second = ComponentName::new("web").unwrap();
    let with_second = |deployment: &mut replank_core::record::Deployment, digit: char| {
        let id = Digest::new(format!("sha256:{}", digit.to_string().repeat(64))).unwrap();
        deployment.images.insert(second.clone(), ImageId::Engine { id, name: "web".to_owned() });
    };
    let mut record = record_in(State::Succeeded, Mode::BlueGreen);
    let mut new = deployment("job-1", 2);
    with_second(&mut new, '6');
    (record.running, record.serving) = (Some(new.clone()), Some(new));
    let snapshot = record.snapshot.as_mut().unwrap();
    with_second(&mut snapshot.deployment, '5');
    let before = snapshot.deployment.clone();
    let actor = Actor { oid: "op".to_owned(), name: String::new(), from: String::new() };
    let back = Event::RollbackStarted { actor, reason: String::new(), data_restored: false };
    let Phase::RollingBack(back) = apply(&record, &back, Millis(5)).unwrap().record.phase else {
        panic!("it goes back")
    };
    assert_eq!((back.swap.to.images.len(), &back.swap.to), (2, &before));
}
