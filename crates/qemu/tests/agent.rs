//! Programs in a real guest, by its agent.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::time::{Duration, Instant};

use godwit_qemu::{AgentError, ExecOutput, GuestCommand};
use godwit_testkit::{LONG, Place, sh, tiny, up};

/// Bytes that are no text and no two pages of which are alike.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_u32;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x.to_le_bytes()
    };
    let mut out: Vec<u8> = (0..len.div_ceil(4)).flat_map(|_| next()).collect();
    out.truncate(len);
    out
}

#[tokio::test]
async fn programs_run_side_by_side_and_what_they_read_and_write_is_whole() {
    let place = Place::new();
    let machine = place.launch("exec", &tiny()).spawn().await.unwrap();
    up(&machine).await;
    let agent = machine.agent();

    // One that takes its time keeps nobody waiting, and its end is told to whoever asks then.
    let slow = ["sh", "-c", "sleep 6; echo slept; exit 7"];
    let slow = GuestCommand { path: "/bin/busybox", args: &slow, ..GuestCommand::default() };
    let pid = agent.start(slow, LONG).await.unwrap();
    assert_eq!(agent.wait(pid, Duration::ZERO).await.unwrap(), None);
    let begin = Instant::now();
    let waits = agent.wait(pid, LONG);
    let others = async {
        for n in 0..3 {
            assert_eq!(sh(&machine, &format!("echo {n}")).await, n.to_string());
        }
        begin.elapsed()
    };
    let (slept, others) = tokio::join!(waits, others);
    let slept = slept.unwrap().expect("ended");
    assert_eq!((slept.exit, slept.text().as_str()), (Some(7), "slept\n"));
    assert!(others < Duration::from_secs(6), "{others:?}");
    let again = agent.wait(pid, Duration::ZERO).await.expect_err("told once");
    assert!(matches!(again, AgentError::Refused { .. }), "{again}");
    let late = agent.exec("/bin/sleep", &["30"], &[], b"", Duration::from_millis(300)).await;
    let late = late.expect_err("it runs on");
    assert!(late.to_string().contains("still runs in the guest (pid "), "{late}");

    for mib in [1, 4] {
        let input = noise(mib << 20);
        let begin = Instant::now();
        let ran = agent.exec("/bin/cat", &["-"], &[], &input, LONG);
        // A long input keeps nobody waiting either.
        let beside = async {
            let _ = sh(&machine, "true").await;
            begin.elapsed()
        };
        let (back, beside) = tokio::join!(ran, beside);
        let back = back.unwrap();
        assert!(mib < 4 || beside < begin.elapsed() * 3 / 4, "{beside:?}");
        eprintln!("{mib} MiB in and out: {:?}", begin.elapsed());
        assert!(back.stdout == input && !back.truncated, "{} bytes came back", back.stdout.len());
    }

    // What is more than the agent keeps is cut, which is told, and harms nobody after it.
    let much = ["if=/dev/zero", "bs=1M", "count=20"];
    let begin = Instant::now();
    let cut = agent.exec("/bin/dd", &much, &[], b"", LONG).await.unwrap();
    eprintln!("20 MiB out: {:?}", begin.elapsed());
    assert!(cut.truncated && cut.exit == Some(0), "{:?}", cut.exit);
    assert_eq!(cut.stdout.len(), ExecOutput::MAX_BYTES);
    assert_eq!(sh(&machine, "echo fine; ls /run | grep -c input; true").await, "fine\n0");
    machine.kill().await;
}
