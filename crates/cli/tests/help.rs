//! What the command says of itself.

use std::process::Command;

fn said(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_godwit"))
        .args(args)
        .env("COLUMNS", "80")
        .output()
        .expect("run");
    assert!(out.status.success(), "{args:?}");
    String::from_utf8(out.stdout).expect("text")
}

#[test]
fn every_noun_and_verb_is_in_the_help() {
    let help = said(&["--help"]);
    for noun in ["up", "down", "vm", "substrate", "image", "site", "op", "pool", "doctor"] {
        assert!(help.lines().any(|l| l.trim_start().starts_with(noun)), "{noun}\n{help}");
    }
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("3 unchanged, 4 not found"), "{help}");
    let vm = said(&["vm", "--help"]);
    for verb in [
        "create",
        "activate",
        "list",
        "get",
        "stop",
        "start",
        "delete",
        "dock",
        "migrate",
        "console",
        "screenshot",
        "type",
        "view",
    ] {
        assert!(vm.lines().any(|l| l.trim_start().starts_with(verb)), "{verb}\n{vm}");
    }
}

#[test]
fn completion_and_manual_pages_are_made() {
    assert!(said(&["completion", "bash"]).contains("_godwit()"));
    assert!(said(&["man"]).contains(".TH godwit 1"));
    let dir = tempfile::tempdir().expect("dir");
    said(&["man", "--dir", dir.path().to_str().expect("path")]);
    assert!(dir.path().join("godwit-vm-migrate.1").exists());
}
