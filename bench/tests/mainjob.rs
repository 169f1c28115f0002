//! The suite `mainjob` on a real guest over a real link: stock QEMU's side, which needs nothing
//! of Godwit but the room that starts QEMU.

use godwit_bench::harness;
use godwit_bench::suites::{self, Plan, mainjob};
use godwit_image::ImageCache;
use godwit_types::Name;

#[tokio::test]
async fn stock_qemu_moves_a_working_guest_and_loses_nothing() {
    let images = std::env::var_os("GODWIT_IMAGES")
        .map_or_else(|| "/var/cache/godwit/images".into(), std::path::PathBuf::from);
    let guest = Name::new("tiny").expect("a name");
    let cache = ImageCache::open(&images).expect("the image cache");
    if cache.get(&guest).is_err() {
        cache.build(&guest, |_| {}).await.expect("tiny is built");
    }
    let plan = Plan {
        quick: true,
        rounds: Some(1),
        images,
        guest,
        witness_mib: 8,
        witness_beside: Vec::new(),
        rate_mbit: 300.0,
        delay_ms: 5.0,
        stock_downtime_ms: None,
    };
    let stock = async |r: &mut harness::Results| mainjob::run_stock(&plan, r).await;
    let results = suites::run("mainjob", true, stock).await.expect("a round succeeds");

    let stock = &results.reports["stock"][0];
    assert_eq!(stock["intact"], true, "{stock}");
    let moved = &stock["move"];
    let number = |key: &str| moved[key].as_f64().expect("a number");
    assert!(number("downtime_ms") > 0.0 && number("downtime_ms") < number("switch_ms"), "{moved}");
    let sum: f64 = moved["phases"]
        .as_array()
        .expect("phases")
        .iter()
        .map(|p| p["ms"].as_f64().expect("a number"))
        .sum();
    assert!((sum - number("total_ms")).abs() < 0.01, "{moved}");
    // Everything that QEMU sent crossed the emulated link.
    let bytes = &moved["bytes"];
    let payload = bytes["memory"].as_f64().expect("memory") + bytes["disk"].as_f64().expect("disk");
    assert!(payload > 1e6 && number("wire_bytes") >= payload, "{moved}");

    let dir = tempfile::tempdir().expect("a directory");
    harness::write(&results, dir.path()).expect("written");
    for file in ["results.json", "report.md", "report.html", "switch.svg", "downtime.svg"] {
        assert!(dir.path().join(file).exists(), "{file}");
    }
}
