//! The real decisions and transitions in a world of crashes, pauses, lost answers and late effects, searched exhaustively
//! within bounds; and the proof that each invariant can fail.
#![allow(clippy::unwrap_used)]

mod fair;
#[path = "../support/mod.rs"]
mod support;
mod turn;
mod world;

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex};

use replank_core::format::FORMAT;
use replank_core::phase::{Mode, Phase, State};
use replank_core::record::*;
use stateright::{Checker, HasDiscoveries, Model, Path, Property};

use turn::Local;
use world::*;

#[derive(Debug, Clone)]
struct Upgrades {
    config: Config,
    /// Worlds that are known to come to rest.
    rests: Arc<Mutex<HashSet<u64>>>,
    /// Every state that was reached: a search that never gets there proves nothing.
    reached: Arc<Mutex<BTreeSet<State>>>,
    /// What else was seen of records that not everybody reads.
    seen: Arc<Mutex<BTreeSet<Seen>>>,
    /// Looks at one property alone.
    only: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    Raised,
    /// A controller runs that cannot read the record any more.
    Blind,
    /// A release was refused because its Replank cannot read the record.
    ReaderRefused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Move {
    /// The phase's time is over.
    TimePasses,
    /// At rest, the snapshot's time is over.
    Expires,
    Receive(usize),
    Answer(usize),
    /// The ledger's answer to an operator's request is lost; it was taken or it was not.
    LoseReply(usize, bool),
    Think(usize),
    ThinkAndFail(usize),
    Act(usize),
    /// The ledger's answer to a controller's commit is lost; it was taken or it was not.
    LoseAnswer(usize, bool),
    Crash(usize),
    Pause(usize),
    Arrive(usize),
    ArriveInPart(usize),
    /// The answer does not come; the request may still arrive, or never.
    TimeOut(usize),
    Refuse(usize),
    /// The revision that serves stops to answer.
    Sicken,
    /// A container of the new revision ends by itself.
    Exit,
}

/// More late effects than this at once add states and no new situation.
const FLIGHTS: usize = 3;

impl Upgrades {
    fn new(config: Config) -> Self {
        Self { config, rests: Arc::default(), reached: Arc::default(), seen: Arc::default(), only: None }
    }

    fn note(&self, world: &World) {
        let record = &world.record;
        self.reached.lock().unwrap().insert(record.phase.state());
        if record.min_reader > FORMAT {
            let blind = world.controllers.keys().any(|id| reads(&self.config, id) < record.min_reader);
            let refused =
                matches!(&record.phase, Phase::FailedPre { fault } if fault.what.contains("reads record format"));
            let mut seen = self.seen.lock().unwrap();
            seen.insert(Seen::Raised);
            seen.extend(blind.then_some(Seen::Blind));
            seen.extend(refused.then_some(Seen::ReaderRefused));
        }
    }

    fn comes_to_rest(&self, world: &World) -> Result<(), String> {
        let known = |print| self.rests.lock().unwrap().contains(&print);
        let path = fair::comes_to_rest(&self.config, world, known)?;
        self.rests.lock().unwrap().extend(path);
        Ok(())
    }
}

impl Model for Upgrades {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        vec![first_world(&self.config)]
    }

    fn actions(&self, world: &World, moves: &mut Vec<Move>) {
        if world.broken != 0 {
            return;
        }
        let faulty = world.faults > 0;
        let in_flight = world.record.phase.state().in_flight();
        if in_flight && !world.late {
            moves.push(Move::TimePasses);
        }
        let may_expire = self.config.formats != Formats::One && !in_flight && !world.expired;
        if may_expire && world.record.snapshot.is_some() {
            moves.push(Move::Expires);
        }
        for (i, operator) in world.operators.iter().enumerate() {
            if operator.pending.is_some() {
                moves.push(Move::Answer(i));
                if faulty {
                    moves.extend([Move::LoseReply(i, true), Move::LoseReply(i, false)]);
                }
            } else if let Some(verb) = operator.script.first() {
                let allowed = match verb {
                    Verb::Start(_) => in_flight || world.jobs < self.config.jobs,
                    Verb::Rollback => world.jobs > 0,
                };
                if allowed {
                    moves.push(Move::Receive(i));
                }
            }
        }
        for (i, controller) in world.controllers.values().enumerate() {
            if let Some(pending) = &controller.pending {
                moves.push(Move::Act(i));
                if faulty && matches!(*pending.decision, Thought::Record(_)) {
                    moves.extend([Move::LoseAnswer(i, true), Move::LoseAnswer(i, false)]);
                }
            } else {
                moves.push(Move::Think(i));
            }
            if faulty {
                if controller.pending.is_none() && world.record.phase.state().before_swap() {
                    moves.push(Move::ThinkAndFail(i));
                }
                moves.push(Move::Crash(i));
                if !controller.silent {
                    moves.push(Move::Pause(i));
                }
            }
        }
        for (i, flight) in world.flights.iter().enumerate() {
            moves.push(Move::Arrive(i));
            if faulty {
                moves.push(Move::ArriveInPart(i));
                if flight.waiting.is_some() && world.flights.len() < FLIGHTS {
                    moves.push(Move::TimeOut(i));
                }
                // What runs was accepted once; only a new revision is refused for good.
                if in_flight && flight.waiting.is_some() && flight.task.step.starts_with("start-new:v0-2") {
                    moves.push(Move::Refuse(i));
                }
            }
        }
        match self.config.health {
            Health::Good | Health::Never => {}
            Health::Degrades => moves.push(Move::Sicken),
            Health::Exits if faulty => moves.push(Move::Exit),
            Health::Exits => {}
        }
    }

    fn next_state(&self, last: &World, action: Move) -> Option<World> {
        let config = &self.config;
        let mut world = last.clone();
        let id = |i: usize| last.controllers.keys().nth(i).unwrap().clone();
        let mut fault = || world.faults -= 1;
        match action {
            Move::TimePasses => world.late = true,
            Move::Expires => world.expired = true,
            Move::Receive(i) => turn::receive(config, &mut world, i),
            Move::Answer(i) => turn::answer(config, &mut world, i),
            Move::LoseReply(i, taken) => {
                fault();
                turn::answer_is_lost(config, &mut world, i, taken);
            }
            Move::Think(i) => {
                if !turn::think(config, &mut world, &id(i), Local::Well) {
                    return None;
                }
            }
            Move::ThinkAndFail(i) => {
                fault();
                if !turn::think(config, &mut world, &id(i), Local::Fails) {
                    return None;
                }
            }
            Move::Act(i) => turn::act(config, &mut world, &id(i)),
            Move::LoseAnswer(i, taken) => {
                fault();
                turn::loses_answer(config, &mut world, &id(i), taken);
            }
            Move::Crash(i) => {
                fault();
                let id = id(i);
                world.dies(&id);
                let again = Controller { silent: true, ..Controller::default() };
                world.controllers.insert(id, again);
            }
            Move::Pause(i) => {
                fault();
                world.controllers.get_mut(&id(i)).unwrap().silent = true;
            }
            Move::Arrive(i) => {
                let flight = world.flights.remove(i);
                world.carry_out(config, &flight.change, false);
                turn::heard(&mut world, &flight, None);
            }
            Move::ArriveInPart(i) => {
                fault();
                let flight = world.flights.remove(i);
                world.carry_out(config, &flight.change, true);
                turn::heard(&mut world, &flight, Some(Badly::Perhaps));
            }
            Move::TimeOut(i) => {
                fault();
                let flight = world.flights[i].clone();
                world.flights[i].waiting = None;
                world.flights.sort_by_cached_key(Flight::order);
                turn::heard(&mut world, &flight, Some(Badly::Perhaps));
            }
            Move::Refuse(i) => {
                fault();
                let flight = world.flights.remove(i);
                turn::heard(&mut world, &flight, Some(Badly::ForGood));
            }
            Move::Sicken => {
                let serves = last.platform.traffic.clone()?;
                if serves.as_str().starts_with("v0-1-") || last.platform.sick.contains(&serves) {
                    return None;
                }
                world.platform_mut().sick.insert(serves);
            }
            Move::Exit => {
                fault();
                let revision = last.record.phase.swap().map(|s| s.to.revision.clone())?;
                let there = last.platform.revisions.get(&revision)?;
                if revision.as_str().starts_with("v0-1-") || !there.containers[&app()].running {
                    return None;
                }
                let platform = world.platform_mut();
                let there = platform.revisions.get_mut(&revision)?;
                // Under a restart policy the engine would start it again at once.
                if there.containers[&app()].alone {
                    return None;
                }
                there.containers.get_mut(&app())?.running = false;
                world.dies(&revision);
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn without<const BIT: u16>(_: &Upgrades, world: &World) -> bool {
            world.broken & BIT == 0
        }
        let mut all = vec![
            Property::always("one job in flight", without::<{ broken::JOB_REPLACED }>),
            Property::always("one revision for one job", without::<{ broken::SECOND_REVISION }>),
            Property::always("one effective change for one key", without::<{ broken::SECOND_COPY }>),
            Property::always("no success without observation", without::<{ broken::UNPROVED }>),
            Property::always("no lost audit event", without::<{ broken::AUDIT_LOST }>),
            Property::always("a way back before a swap", without::<{ broken::NO_WAY_BACK }>),
            Property::always("generations only rise", without::<{ broken::GENERATION_DOWN }>),
            Property::always("nobody retires its own revision", without::<{ broken::OWN_GOAL }>),
            Property::always("what is needed is never removed", without::<{ broken::NEEDED_REMOVED }>),
            Property::always("nothing touched before all is built", without::<{ broken::TOUCHED_EARLY }>),
            Property::always("nobody acts on a record that it cannot read", without::<{ broken::BLIND }>),
            Property::always("whoever is needed can read the record", without::<{ broken::SHUT_OUT }>),
            Property::always("a lost answer doubles nothing", without::<{ broken::TWICE }>),
            Property::always("comes to rest", |model: &Upgrades, world: &World| {
                model.note(world);
                world.broken != 0 || model.comes_to_rest(world).is_ok()
            }),
        ];
        all.retain(|property| self.only.is_none_or(|only| only == property.name));
        all
    }
}

fn config() -> Config {
    Config {
        mode: Mode::Single,
        health: Health::Good,
        policy: OnRolloutFailure::Hold,
        faults: 1,
        jobs: 1,
        rollback: false,
        overlap: Overlap::StopOldFirst,
        formats: Formats::One,
        mutant: None,
    }
}

fn full() -> bool {
    std::env::var_os("REPLANK_FULL").is_some_and(|v| v == "1")
}

/// How a search ended: the states it saw, and the shortest way to break something.
struct Searched {
    states: usize,
    broke: Option<(&'static str, Path<World, Move>)>,
}

/// Searches breadth first, until something breaks or, `most` being none, until there is nothing new.
fn search(model: &Upgrades, most: Option<usize>) -> Searched {
    let checker = model.clone().checker().threads(2).finish_when(HasDiscoveries::AnyFailures);
    let checker = match most {
        Some(most) => checker.target_state_count(most),
        None => checker,
    };
    let checker = checker.spawn_bfs().join();
    Searched { states: checker.unique_state_count(), broke: checker.discoveries().into_iter().next() }
}

fn check(config: &Config, most: Option<usize>) -> Upgrades {
    let model = Upgrades::new(config.clone());
    let searched = search(&model, most);
    eprintln!("{} states of {config:?}", searched.states);
    if let Some((property, path)) = searched.broke {
        for (world, step) in path.clone().into_vec() {
            eprintln!("{}\n  {step:?}", fair::tell(&world));
        }
        let rest = model.comes_to_rest(path.last_state());
        panic!("'{property}' broke in {config:?}: {rest:?}");
    }
    // A search that never gets anywhere proves nothing.
    let reached = model.reached.lock().unwrap();
    let mut expected = vec![State::RollingOut];
    if config.rollback && most.is_none() {
        expected.extend([State::RollingBack, State::RolledBack, State::FailedPre]);
    }
    if most.is_none() && config.health != Health::Never {
        expected.push(State::Succeeded);
    }
    for state in expected {
        assert!(reached.contains(&state), "{} was never reached", state.name());
    }
    drop(reached);
    model
}

/// Every order of everything: two operators, two controllers, late effects, time that runs out. In the full run with a
/// fault at any moment of it.
fn every_order(mode: Mode, healths: &[Health]) {
    use OnRolloutFailure::{Hold, Rollback};
    use Overlap::{StartAfterCutover, StopOldFirst};
    let config = Config { mode, rollback: true, faults: u8::from(full()), ..config() };
    for &health in healths {
        for overlap in [StopOldFirst, StartAfterCutover] {
            for policy in [Hold, Rollback] {
                check(&Config { health, policy, overlap, ..config }, None);
            }
        }
    }
}

#[test]
fn every_order_in_single_mode() {
    every_order(Mode::Single, &[Health::Good, Health::Never]);
}

#[test]
fn every_order_in_blue_green_mode() {
    every_order(Mode::BlueGreen, &[Health::Good, Health::Never]);
}

#[test]
fn every_order_when_green_degrades() {
    every_order(Mode::BlueGreen, &[Health::Degrades]);
}

/// One fault, then two, at any moment of an upgrade; with a rollback too as far as the bound goes.
#[test]
fn a_fault_at_any_moment() {
    const MOST: usize = 40_000;
    for mode in [Mode::Single, Mode::BlueGreen] {
        for health in [Health::Good, Health::Never, Health::Exits] {
            let config = Config { mode, health, faults: 1, ..config() };
            check(&config, None);
            check(&Config { rollback: true, ..config.clone() }, (!full()).then_some(MOST));
            if full() {
                check(&Config { faults: 2, ..config }, None);
            }
        }
    }
}

/// Two jobs, of which the first brings a newer Replank that writes what this build cannot read once nobody needs it; the
/// second brings a newer one too, or this build again. In the full run also with a fault at any moment, as far as the bound goes.
#[test]
fn two_versions_of_replank() {
    const MOST: usize = 1_000_000;
    for (formats, more) in [(Formats::Newer, Seen::Blind), (Formats::NewerAndBack, Seen::ReaderRefused)] {
        for mode in [Mode::Single, Mode::BlueGreen] {
            let config = Config { mode, faults: 0, jobs: 2, rollback: true, formats, ..config() };
            let model = check(&config, None);
            let seen = model.seen.lock().unwrap();
            assert!(seen.is_superset(&[Seen::Raised, more].into()), "{formats:?}, {mode:?}: only {seen:?}");
            if full() {
                check(&Config { faults: 1, ..config }, Some(MOST));
            }
        }
    }
}

/// Deep histories that no exhaustive search reaches: three faults, two jobs, a rollback. The same walks every time.
#[test]
fn long_histories_with_many_faults() {
    let walks = if full() { 20_000 } else { 600 };
    const STEPS: usize = 300;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).unwrap()
    };
    let healths = [Health::Good, Health::Never, Health::Degrades, Health::Exits];
    let mut steps = 0;
    for walk in 0..walks {
        let model = Upgrades::new(Config {
            mode: [Mode::Single, Mode::BlueGreen][walk % 2],
            health: healths[walk / 2 % 4],
            policy: [OnRolloutFailure::Hold, OnRolloutFailure::Rollback][walk / 8 % 2],
            overlap: [Overlap::StopOldFirst, Overlap::StartAfterCutover][walk / 16 % 2],
            faults: 3,
            jobs: 2,
            rollback: true,
            formats: [Formats::One, Formats::Newer, Formats::NewerAndBack][walk / 32 % 3],
            mutant: None,
        });
        let mut world = first_world(&model.config);
        let mut told = vec![];
        for _ in 0..STEPS {
            let mut moves = vec![];
            model.actions(&world, &mut moves);
            // Faults and time are rarer than work, or no walk would get far.
            let work = |m: &Move| matches!(m, Move::Think(_) | Move::Act(_) | Move::Arrive(_));
            if random(8) > 0 && moves.iter().any(work) {
                moves.retain(work);
            }
            let step = moves[random(moves.len())];
            let Some(next) = model.next_state(&world, step) else {
                continue;
            };
            told.push(format!("{}\n  {step:?}", fair::tell(&world)));
            world = next;
            steps += 1;
            let rest = model.comes_to_rest(&world);
            assert!(
                world.broken == 0 && rest.is_ok(),
                "walk {walk}, {:?}, broken {}: {rest:?}\n{}",
                model.config,
                world.broken,
                told.join("\n")
            );
        }
    }
    eprintln!("{steps} steps of {walks} histories");
}

/// Each invariant is broken by a seeded mistake; what finds nothing in a broken world would find nothing in ours.
#[test]
fn every_invariant_is_broken_by_a_mutant() {
    const MOST: usize = 400_000;
    let faulty = Config { faults: 1, ..config() };
    let exits = Config { health: Health::Exits, ..faulty.clone() };
    let never = Config { health: Health::Never, ..config() };
    let newer = Config { formats: Formats::Newer, jobs: 2, rollback: true, ..config() };
    // Who stands by acts when the driver is quiet.
    let newer_and_quiet = Config { faults: 1, rollback: false, ..newer.clone() };
    let and_back = Config { formats: Formats::NewerAndBack, rollback: false, ..newer.clone() };
    for (mutant, property, config) in [
        (Mutant::NoCompareAndSwap, "one job in flight", config()),
        (Mutant::StartInFlight, "one job in flight", config()),
        (Mutant::KeyPerProcess, "one revision for one job", faulty.clone()),
        (Mutant::NamesDoNotCollide, "one effective change for one key", faulty.clone()),
        (Mutant::ProbesUnasked, "no success without observation", never),
        (Mutant::SuccessWithoutTraffic, "no success without observation", config()),
        (Mutant::NoCompareAndSwap, "no lost audit event", config()),
        (Mutant::AuditDropped, "no lost audit event", faulty.clone()),
        (Mutant::NoSnapshot, "a way back before a swap", config()),
        (Mutant::ProxyIgnoresGenerations, "generations only rise", faulty.clone()),
        (Mutant::ActsForTheDriver, "nobody retires its own revision", config()),
        (Mutant::RemovesWhatIsNeeded, "what is needed is never removed", config()),
        (Mutant::StartsBeforeBuilt, "nothing touched before all is built", config()),
        (Mutant::NoRepair, "comes to rest", config()),
        (Mutant::NoTakeOver, "comes to rest", exits),
        (Mutant::ReadsBlindly, "nobody acts on a record that it cannot read", newer_and_quiet),
        (Mutant::RaisesAtOnce, "whoever is needed can read the record", newer.clone()),
        (Mutant::RaisesAtOnce, "comes to rest", newer),
        (Mutant::TakesAnyReader, "whoever is needed can read the record", and_back),
        (Mutant::CommitsAgain, "a lost answer doubles nothing", faulty.clone()),
        (Mutant::StartsAgain, "a lost answer doubles nothing", Config { jobs: 2, ..faulty }),
    ] {
        let mut model = Upgrades::new(Config { mutant: Some(mutant), ..config });
        model.only = Some(property);
        let searched = search(&model, Some(MOST));
        let found = searched.broke.map(|(name, path)| (name, path.into_vec().len()));
        eprintln!("{mutant:?}: {found:?} after {} states", searched.states);
        assert!(found.is_some(), "nobody noticed {mutant:?} break '{property}'");
    }
}
