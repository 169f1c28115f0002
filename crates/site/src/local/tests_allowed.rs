use godwit_qemu::MacAddress;
use godwit_types::{Arch, Hash, Mib, SubstrateId, VmId};

use super::super::course::{Migration, Step};
use super::super::record::DiskBase;
use super::*;

const ACTIONS: [Action; 16] = [
    Action::Start,
    Action::Stop,
    Action::ForceStop,
    Action::Delete,
    Action::Dock,
    Action::Leave,
    Action::Exec,
    Action::Log,
    Action::Console,
    Action::Screen,
    Action::Arrive,
    Action::ResumeArrival,
    Action::ResumeDeparture,
    Action::Release,
    Action::Abort,
    Action::Publish,
];

const LIVES: [Life; 9] = [
    Life::Incoming,
    Life::Paused,
    Life::Running,
    Life::Leaving,
    Life::PostMigrate,
    Life::PoweredOff,
    Life::Stalled,
    Life::Broken,
    Life::Exited,
];

fn name(name: &str) -> Name {
    Name::new(name).expect("name")
}

fn record() -> MachineRecord {
    MachineRecord {
        warrant: None,
        vm: VmId::new(),
        name: name("m"),
        generation: Generation(7),
        desired: DesiredState::Running,
        image: name("tiny"),
        image_hash: Hash::of(b"tiny"),
        substrate: None,
        arch: Arch::X86_64,
        memory: Mib(256),
        vcpus: 1,
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        disk_base: DiskBase::Image,
        migration: None,
        reason: None,
        unfinished: None,
        attachment: None,
        published: Vec::new(),
        back: None,
    }
}

fn comes(steps: &[Step]) -> MachineRecord {
    moving(Migration::arrival(MigrationId::new(), name("cafe")), steps)
}

fn leaves(steps: &[Step]) -> MachineRecord {
    moving(Migration::departure(MigrationId::new(), name("cafe"), None), steps)
}

fn moving(begun: Migration, steps: &[Step]) -> MachineRecord {
    let m = steps.iter().fold(begun, |m, step| m.after(step.clone()).expect("a step"));
    MachineRecord { migration: Some(m), ..record() }
}

/// A record of each phase, and what is done to its machine.
fn phases() -> Vec<(MachineRecord, Activity)> {
    let at_rest = |record| (record, Activity::Nothing);
    let docking = Unfinished::Docking { substrate: SubstrateId::new(), nics: Vec::new() };
    let reason = Some("its record is damaged: byte 3".to_owned());
    vec![
        at_rest(MachineRecord { desired: DesiredState::Gone, ..record() }),
        at_rest(MachineRecord { generation: UNKNOWN_GENERATION, reason, ..record() }),
        (
            MachineRecord { unfinished: Some(Unfinished::Activating), ..record() },
            Activity::Starting,
        ),
        at_rest(record()),
        (MachineRecord { desired: DesiredState::Stopped, ..record() }, Activity::PoweringOff),
        (MachineRecord { unfinished: Some(docking.clone()), ..record() }, Activity::Docking),
        at_rest(MachineRecord { unfinished: Some(docking), ..record() }),
        at_rest(leaves(&[])),
        at_rest(leaves(&[Step::RanOn])),
        at_rest(comes(&[])),
        at_rest(comes(&[Step::Ran])),
        at_rest(comes(&[Step::Abandoned("lost".into())])),
    ]
}

fn every_state() -> Vec<State> {
    let qemus = [Qemu::Gone, Qemu::There].into_iter().chain(LIVES.map(Qemu::Is));
    let mut all = Vec::new();
    for (qemu, display) in qemus.flat_map(|q| [(q, false), (q, true)]) {
        for (r, doing) in phases() {
            all.push(State::of(&r, &name("here"), doing, (qemu, display)));
        }
    }
    all
}

fn outcome_text(outcome: &Result<First, Refusal>) -> String {
    let long = match outcome {
        Ok(First::Nothing) => "yes".to_owned(),
        Ok(first) => format!("yes:{first:?}"),
        Err(r) => format!("{r:?}"),
    };
    long.split([' ', '(']).next().unwrap_or_default().to_owned()
}

/// One line for each phase, `QEMU` being as given.
fn table(qemu: Qemu, actions: &[Action]) -> String {
    let states =
        phases().into_iter().map(|(r, doing)| State::of(&r, &name("here"), doing, (qemu, true)));
    let lines = states.map(|s| {
        let phase = format!("{:?}", s.phase);
        let phase = phase.split('(').next().unwrap_or_default().to_owned();
        let cells = actions.iter().map(|a| format!("{:<11}", outcome_text(&s.allows(*a))));
        format!("{phase:<11} {}", cells.collect::<Vec<_>>().join(" ")).trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn what_changes_a_machine_whose_guest_runs() {
    use Action::{Delete, Dock, ForceStop, Leave, Start, Stop};
    let found = table(Qemu::Is(Life::Running), &[Start, Stop, ForceStop, Delete, Dock, Leave]);
    let expected = "\
Gone        Gone        Gone        Gone        yes         Gone        Gone
Damaged     Damaged     Damaged     Damaged     yes         Damaged     Damaged
Starting    Starting    Starting    yes:Start   yes:Start   Starting    Starting
Settled     Running     yes         yes         yes         yes         yes
PoweringOff Running     PoweringOff yes         yes         PoweringOff PoweringOff
Docking     yes:Docking yes:Docking yes:Docking yes:Docking yes:Docking yes:Docking
Undocking   Undocking   Undocking   yes         yes         Undocking   Undocking
Leaving     yes:Move    Leaving     yes:Move    yes:Move    Leaving     Leaving
RanOn       yes:Move    Leaving     yes:Move    yes:Move    Leaving     Leaving
Arriving    Arriving    Arriving    Arriving    yes:Move    Arriving    Arriving
Arrived     Arrived     Arrived     Arrived     yes:Move    Arrived     Arrived
Stranded    yes:Arrival Stranded    Stranded    yes:Move    Stranded    Stranded";
    assert_eq!(found, expected, "\n{found}");
}

#[test]
fn what_changes_a_machine_without_a_qemu() {
    use Action::{Delete, Dock, ForceStop, Leave, Start, Stop};
    let found = table(Qemu::Gone, &[Start, Stop, ForceStop, Delete, Dock, Leave]);
    let expected = "\
Gone        Gone        Gone        Gone        yes         Gone        Gone
Damaged     Damaged     Damaged     Damaged     yes         Damaged     Damaged
Starting    Starting    Starting    yes:Start   yes:Start   Starting    Starting
Settled     yes         yes         yes         yes         NotRunning  NotRunning
PoweringOff yes         PoweringOff yes         yes         PoweringOff PoweringOff
Docking     yes:Docking yes:Docking yes:Docking yes:Docking yes:Docking yes:Docking
Undocking   Undocking   Undocking   yes         yes         Undocking   Undocking
Leaving     yes:Move    Leaving     yes:Move    yes:Move    Leaving     Leaving
RanOn       yes:Move    Leaving     yes:Move    yes:Move    Leaving     Leaving
Arriving    Arriving    Arriving    Arriving    yes:Move    Arriving    Arriving
Arrived     Arrived     Arrived     Arrived     yes:Move    Arrived     Arrived
Stranded    yes:Arrival Stranded    Stranded    yes:Move    Stranded    Stranded";
    assert_eq!(found, expected, "\n{found}");
}

#[test]
fn what_a_move_may_ask() {
    use Action::{Abort, Arrive, Release, ResumeArrival, ResumeDeparture};
    let asked = [Arrive, ResumeArrival, ResumeDeparture, Release, Abort];
    let found = table(Qemu::Is(Life::Running), &asked);
    let expected = "\
Gone        Here        NotInMove   NotInMove   yes         yes
Damaged     Here        NotInMove   NotInMove   yes         RunsHere
Starting    Here        NotInMove   NotInMove   yes         RunsHere
Settled     Here        NotInMove   NotInMove   yes         RunsHere
PoweringOff Here        NotInMove   NotInMove   yes         RunsHere
Docking     Here        NotInMove   NotInMove   yes         RunsHere
Undocking   Here        NotInMove   NotInMove   yes         RunsHere
Leaving     Here        NotInMove   yes         yes:Move    yes:Move
RanOn       Here        NotInMove   RanOn       yes:Move    yes:Move
Arriving    Here        yes         NotInMove   yes         yes:Move
Arrived     Here        yes         NotInMove   yes         RunsHere
Stranded    Here        yes         NotInMove   yes         RunsHere";
    assert_eq!(found, expected, "\n{found}");
    let found = table(Qemu::Gone, &[Abort]);
    let arriving = found.lines().find(|l| l.starts_with("Arriving")).unwrap_or_default();
    assert!(arriving.ends_with("yes:Move"), "one that never ran is taken back: {arriving}");
    assert!(found.lines().all(|l| l.ends_with("yes") || !l.starts_with("Settled")), "{found}");
}

#[test]
fn what_is_shown_depends_on_qemu_alone() {
    for s in every_state() {
        let shown = |a| outcome_text(&s.allows(a));
        if s.phase == Phase::Gone {
            assert_eq!(shown(Action::Log), "Gone");
            continue;
        }
        assert_eq!(shown(Action::Log), "yes", "{s:?}");
        let (console, screen) = match (s.qemu, s.display) {
            (Qemu::Gone, _) => ("NotRunning", "NotRunning"),
            (_, false) => ("yes", "NoDisplay"),
            (_, true) => ("yes", "yes"),
        };
        assert_eq!((&*shown(Action::Console), &*shown(Action::Screen)), (console, screen), "{s:?}");
        let exec = match s.qemu {
            _ if s.phase == Phase::Docking => "yes:Docking",
            Qemu::Gone => "NotRunning",
            Qemu::There | Qemu::Is(Life::Running | Life::Paused) => "yes",
            Qemu::Is(_) => "Still",
        };
        assert_eq!(shown(Action::Exec), exec, "{s:?}");
    }
}

#[test]
fn a_delete_leads_out_of_every_state_and_a_stop_by_force_out_of_all_that_keep_their_disk() {
    for s in every_state() {
        assert!(s.allows(Action::Delete).is_ok(), "{s:?}");
        let kept = matches!(
            s.phase,
            Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Docking
                | Phase::Undocking
                | Phase::Leaving(_)
                | Phase::RanOn(_)
        );
        assert_eq!(s.allows(Action::ForceStop).is_ok(), kept, "{s:?}");
        // Whoever knows of its generation, and nobody who knows of an older one.
        assert_eq!(s.fence(s.generation), Ok(()));
        assert!(s.generation == UNKNOWN_GENERATION || s.fence(Generation(6)).is_err());
    }
}

#[test]
fn every_refusal_names_the_machine_and_says_what_to_do() {
    let mut all: Vec<Refusal> = every_state()
        .iter()
        .flat_map(|s| ACTIONS.into_iter().filter_map(|a| s.allows(a).err()))
        .collect();
    all.push(Refusal::NoGeneration(Generation(u64::MAX)));
    all.push(Refusal::Fenced { machine: name("m"), seen: Generation(7), given: Generation(6) });
    let (machine, seen, given) = ("m".to_owned(), Generation(7), Generation(6));
    all.push(Refusal::Left { machine, site: name("here"), seen, given });
    let variants: std::collections::BTreeSet<String> =
        all.iter().map(|r| outcome_text(&Err(r.clone()))).collect();
    assert_eq!(variants.len(), 20, "each refusal is reached by some state: {variants:?}");
    for r in all {
        let words = r.to_string();
        let machine = matches!(r, Refusal::Damaged { .. } | Refusal::NoGeneration(_));
        assert!(words.contains("machine 'm'") || machine, "{words}");
        let fault = Fault::from(r.clone());
        assert_eq!((fault.code, &fault.message), (r.code(), &words));
        assert!(fault.hint.expect("a hint").contains("godwit "), "{words}");
    }
}

#[test]
fn nobody_is_advised_to_delete_a_machine_that_runs_here_and_still_moves() {
    let hint = |record: &MachineRecord| {
        let state = State::of(record, &name("here"), Activity::Nothing, (Qemu::There, false));
        state.allows(Action::ForceStop).expect_err("its memory is nowhere else").hint()
    };
    let arriving = hint(&comes(&[]));
    assert!(
        arriving.contains("godwit op cancel") && arriving.contains("and its disk"),
        "{arriving}"
    );
    let arrived = hint(&comes(&[Step::Ran]));
    assert!(!arrived.contains("delete") && !arrived.contains("cancel"), "{arrived}");
}

#[test]
fn a_migration_is_seen_by_its_own_id_only() {
    let r = leaves(&[]);
    let id = r.migration.as_ref().map(|m| m.id).expect("one");
    let state = || State::of(&r, &name("here"), Activity::Nothing, (Qemu::There, false));
    assert_eq!(state().in_move(&r, id).phase, Phase::Leaving(name("cafe")));
    let other = state().in_move(&r, MigrationId::new());
    assert_eq!(other.phase, Phase::Settled);
    assert_eq!(outcome_text(&other.allows(Action::ResumeDeparture)), "NotInMove");
}

#[test]
fn what_is_reported_to_the_center() {
    let told = |phase: usize, life| {
        let (r, doing) = phases().swap_remove(phase);
        let state = State::of(&r, &name("here"), doing, (Qemu::Gone, false));
        state.asked(life).vm_state()
    };
    assert_eq!(told(1, Some(Life::Running)), VmState::Failed, "damaged");
    assert_eq!(told(2, None), VmState::Starting);
    assert_eq!(told(3, None), VmState::Failed);
    assert_eq!(told(3, Some(Life::Paused)), VmState::Running);
    assert_eq!(told(3, Some(Life::PoweredOff)), VmState::Stopped);
    assert_eq!(told(3, Some(Life::PostMigrate)), VmState::Stopped);
    assert_eq!(told(4, None), VmState::Stopped);
    assert_eq!(told(5, Some(Life::Running)), VmState::Docking);
    assert_eq!(told(6, Some(Life::Running)), VmState::Docking);
    assert_eq!(told(7, Some(Life::Running)), VmState::Running);
    assert_eq!(told(7, Some(Life::PostMigrate)), VmState::Moving);
    assert_eq!(told(9, Some(Life::Incoming)), VmState::Moving);
    assert_eq!(told(10, Some(Life::Running)), VmState::Moving);
    assert_eq!(told(11, Some(Life::Running)), VmState::Failed);
    let (r, _) = phases().swap_remove(9);
    let preparing = State::of(&r, &name("here"), Activity::Preparing, (Qemu::Gone, false));
    assert_eq!(preparing.vm_state(), VmState::Starting, "an arrival that is made ready");
}
