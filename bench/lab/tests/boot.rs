//! A machine boots, takes commands, and is gone afterwards.

use std::time::Duration;

use godwit_lab::{Error, Initramfs, Kernel, Machine, Spec};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_guest_takes_commands() {
    let kernel = Kernel::find().expect("a kernel");
    let initramfs = Initramfs::new().program("/bin/bash").expect("bash");
    let spec = Spec::new("lab-boot", 2, 256);
    let mut machine = Machine::boot(&kernel, &initramfs, &spec).expect("it boots");

    let state = machine.ok("cat /sys/kernel/sched_ext/state", SOON).expect("sched_ext is there");
    assert_eq!(state, "disabled\n");
    assert_eq!(
        machine.ok("nproc; uname -r", SOON).expect("it answers"),
        format!("2\n{}\n", kernel.release())
    );
    let answer = machine.run("bash -c 'echo out; echo err >&2; exit 3'", SOON).expect("it answers");
    assert_eq!((answer.status, answer.output.as_str()), (3, "out\nerr\n"));
    assert_eq!(machine.vcpu_threads().expect("threads have names").len(), 2);

    // What is left in the background does not hold up the answer, and one command runs at a time.
    machine.ok("sleep 1000 &", SOON).expect("it goes to the background");
    machine.start("sleep 2; printf 'no newline'").expect("it starts");
    assert!(matches!(machine.start("true"), Err(Error::Protocol { .. })));
    let early = machine.finish(Duration::from_millis(100)).expect_err("it takes 2 s");
    assert!(matches!(early, Error::Late { .. }), "{early}");
    assert_eq!(machine.finish(SOON).expect("it ends").output, "no newline\n");

    machine.ok("echo heard me >/dev/ttyS0", SOON).expect("the console is there");
    machine.wait_console("heard me", SOON).expect("the console is read");
    let gone = machine.run("poweroff -f; sleep 100", SOON).expect_err("it is off");
    assert!(matches!(gone, Error::Ended { .. }), "{gone}");
}

#[test]
fn a_guest_that_is_late_is_ended() {
    let kernel = Kernel::find().expect("a kernel");
    let mut spec = Spec::new("lab-late", 1, 128);
    spec.boot_within = Duration::from_millis(300);
    let late = Machine::boot(&kernel, &Initramfs::new(), &spec).err().expect("no guest is so fast");
    assert!(matches!(late, Error::Late { .. }), "{late}");
    let left = std::fs::read_dir("/proc").expect("/proc").flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("lab-late,debug-threads=on")
    });
    assert!(!left, "QEMU outlived its owner");
}
