//! `sched observe` on real QEMU processes.

mod support;

use std::time::Duration;

use godwit_sched::policy::Alpha;
use godwit_sched_host::observe::{Config, observe};
use godwit_sched_host::sys;
use support::Qemu;

fn look(pids: Vec<i32>) -> godwit_sched_host::observe::Report {
    let config = Config {
        time: Duration::from_secs(2),
        interval: Duration::from_millis(10),
        alpha: Alpha::THESIS,
        only: Some(pids),
    };
    observe(&config, &|| false, &mut |_, _| {}).expect("a report")
}

#[test]
fn siblings_bound_to_one_pcpu_are_stacked_and_those_apart_are_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let qemu = Qemu::start(dir.path(), "stacked", 2);
    let cpus: Vec<usize> = sys::get_affinity(0).expect("own pCPUs").iter().collect();
    assert!(cpus.len() > 1, "this test needs two pCPUs");
    let vcpus = qemu.vcpus();
    let bind = |tid: i32, cpu: usize| {
        sys::set_affinity(tid, &std::iter::once(cpu).collect()).expect("to bind a vCPU");
    };

    vcpus.iter().for_each(|tid| bind(*tid, cpus[0]));
    let report = look(vec![qemu.pid()]);
    let vm = &report.vms[0];
    assert_eq!((report.vms.len(), vm.name.as_str(), vm.vcpus), (1, "stacked", 2));
    assert!(report.any_stacked > 0.9, "both spin on one pCPU: {report:?}");
    assert_eq!(vm.counts.together, 0);

    bind(vcpus[1], cpus[1]);
    let report = look(vec![qemu.pid()]);
    assert!(report.any_stacked < 0.1, "each spins on its own pCPU: {report:?}");
    assert!(report.vms[0].counts.parallel > 0, "both spin: {report:?}");
    // Nothing was changed.
    for (tid, cpu) in vcpus.iter().zip(&cpus) {
        assert_eq!(sys::get_affinity(*tid).expect("its pCPUs").to_string(), cpu.to_string());
        assert_eq!(sys::get_attr(*tid).expect("its attributes").nice, 0);
    }
}
