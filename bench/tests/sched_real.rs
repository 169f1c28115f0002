//! The schedulers of a guest's kernel, measured in the smallest form that has all of it: one boot,
//! EEVDF with and without its timer, SBCO and its strict form, one measured machine and one other.

use std::time::Duration;

use godwit_bench::harness;
use godwit_bench::suites::{self, sched::real::kernel};

#[tokio::test]
async fn a_guests_kernel_is_measured_under_its_own_class_and_ours() {
    let plan = kernel::Plan {
        rounds: 1,
        cpus: 2,
        modes: ["strict", "sbco", kernel::EEVDF, kernel::EEVDF_TICK].map(str::to_owned).into(),
        workloads: vec!["dedup".to_owned()],
        queues: vec![2],
        run: Duration::from_secs(3),
        fairness: Duration::ZERO,
        slower: None,
        clock: godwit_lab::Clock::Host,
    };
    let measure = async |r: &mut harness::Results| kernel::run(&plan, r);
    let results = suites::run("sched", true, measure).await.expect("the guest is measured");
    assert!(!results.notes.iter().any(|n| n.starts_with("Failed")), "{:?}", results.notes);

    for name in ["kernel-dedup-2", "kernel-dedup-2-share", "kernel-dedup-2-switches"] {
        let experiment = results.experiments.iter().find(|e| e.name == name).expect(name);
        for subject in &plan.modes {
            let series = experiment.series.iter().find(|s| s.subject == *subject).expect(subject);
            assert!(series.values[0] > 0.0, "{name} under {subject}: {:?}", series.values);
        }
        assert_eq!(experiment.comparisons[0].subject, "strict", "{name}");
    }
    // One that spins for the other has its part, and no more than its part.
    let share = results.experiments.iter().find(|e| e.name == "kernel-dedup-2-share");
    for series in &share.expect("shares").series {
        assert!((20.0..80.0).contains(&series.values[0]), "{series:?}");
    }
    for mode in ["strict", "sbco"] {
        let counters = &results.reports[&format!("kernel-dedup-2-{mode}")][0];
        assert!(counters.is_object(), "{counters}");
    }
    let said = |what: &str| results.notes.iter().any(|n| n.contains(what));
    assert!(said("Operations of dedup are"), "{:?}", results.notes);

    let dir = tempfile::tempdir().expect("a directory");
    harness::write(&results, dir.path()).expect("written");
    for file in ["results.json", "report.md", "kernel-dedup-2.svg"] {
        assert!(dir.path().join(file).exists(), "{file}");
    }
}
