//! Sites of earlier releases: what the center does without, and what it refuses in words.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use godwit_site::{Incoming, SiteHost, StreamRequest, SubstrateInfo};
use godwit_types::{Code, Fault, OpState, SubstrateKind};

use super::tests::*;
use super::tests_belief::docked;
use super::*;
use crate::ops::OpKind;
use crate::registry::{SubstrateRecord, TenantRecord};

/// A substrate of the center's site.
fn held(w: &World) -> SubstrateRecord {
    let info = SubstrateInfo { kind: SubstrateKind::Restricted, ..docked(7) };
    w.center.substrates.lock().expect("lock").push(info.clone());
    w.c.exchange.adopt_substrate(&name("center"), info).expect("listed")
}

/// Brings it to `cafe`: what was opened there, and how it ended.
async fn brought(w: &World, s: &SubstrateRecord) -> (Vec<StreamRequest>, Option<Fault>) {
    let kind = OpKind::SubstrateCopy {
        substrate: s.id,
        name: s.name.clone(),
        from: name("center"),
        to: name("cafe"),
    };
    let (c, substrate) = (w.c.clone(), s.clone());
    let job = |op| async move {
        c.exchange.carry(&op, &substrate, &name("center"), &name("cafe")).await?;
        Ok(serde_json::Value::Null)
    };
    let op = w.c.ops().start(&me(), kind, job).expect("started");
    let end = w.c.ops().wait(op).await.expect("ends");
    let opened = std::mem::take(&mut *w.cafe.opened.lock().expect("lock"));
    (opened, end.error)
}

#[tokio::test]
async fn a_taker_below_protocol_3_takes_for_one_tenant_and_is_refused_with_two() {
    let w = world(Send::Works).await;
    let s = held(&w);
    for protocol in [1, 2] {
        w.cafe.speaks.store(protocol, SeqCst);
        let (opened, _) = brought(&w, &s).await;
        assert_eq!(opened, [StreamRequest::SubstrateTake { content: s.content }], "{protocol}");
    }
    w.c.registry().people().tenant_add(&me(), &TenantRecord::new(name("acme"))).expect("tenant");
    for protocol in [1, 2] {
        w.cafe.speaks.store(protocol, SeqCst);
        let (opened, fault) = brought(&w, &s).await;
        assert!(opened.is_empty(), "{protocol}: {opened:?}");
        let fault = fault.expect("refused");
        assert_eq!(fault.code, Code::Conflict, "{fault}");
        let words = format!("site 'cafe' speaks protocol {protocol}, and 'substrate take among'");
        assert!(fault.message.contains(&words), "{fault}");
        assert_eq!(fault.hint.as_deref(), Some("update 'cafe'"));
    }
    w.cafe.speaks.store(3, SeqCst);
    let (opened, _) = brought(&w, &s).await;
    assert!(matches!(&opened[..], [StreamRequest::SubstrateTakeAmong(_)]), "{opened:?}");
}

#[tokio::test]
async fn nothing_is_docked_as_public_at_a_site_below_protocol_3() {
    let w = world(Send::Works).await;
    running(&w, "a").await;
    let as_kind = |kind| DockVm { name: None, kind: Some(kind) };
    let public = || as_kind(SubstrateKind::Public);
    for protocol in [1, 2] {
        w.center.speaks.store(protocol, SeqCst);
        let f = w.c.dock(&me(), "a", public(), Mode::Act).expect_err("too old");
        assert_eq!(f.code, Code::Conflict, "{f}");
        let words =
            format!("site 'center' speaks protocol {protocol}, and to generalise a machine");
        assert!(f.message.contains(&words), "{f}");
        w.c.dock(&me(), "a", as_kind(SubstrateKind::Restricted), Mode::DryRun)
            .expect("as restricted it may be");
    }
    w.center.speaks.store(3, SeqCst);
    w.c.dock(&me(), "a", public(), Mode::DryRun).expect("it knows how");
}

#[tokio::test]
async fn a_source_below_protocol_3_is_not_dialled() {
    let w = world(Send::Works).await;
    let source: Arc<dyn SiteHost> = w.center.clone();
    let incoming = |address: &str| Incoming {
        migration: godwit_types::MigrationId::new(),
        address: address.parse().expect("address"),
        peer: name("cafe"),
    };
    let (nowhere, here) = (incoming("0.0.0.0:0"), incoming("10.0.0.7:1"));
    for protocol in [1, 2] {
        w.center.speaks.store(protocol, SeqCst);
        super::meet::can_be_dialled(&source, &here).expect("it dials itself");
        let f = super::meet::can_be_dialled(&source, &nowhere).expect_err("too old");
        assert_eq!(f.code, Code::Unavailable);
        assert!(f.message.contains("the release of site 'center' does not let itself be dialled"));
    }
    w.center.speaks.store(3, SeqCst);
    super::meet::can_be_dialled(&source, &nowhere).expect("it listens");
}

#[tokio::test]
async fn a_site_below_protocol_3_is_not_asked_how_large_a_disk_is() {
    let w = world(Send::Works).await;
    for (protocol, bytes) in [(1, None), (2, None), (3, Some(4 << 30))] {
        w.center.speaks.store(protocol, SeqCst);
        let vm = running(&w, &format!("m-{protocol}")).await;
        assert_eq!(vm.disk_bytes, bytes, "protocol {protocol}");
        let op = w.c.delete(&me(), vm.name.as_str(), Mode::Act).expect("accepted").op.expect("op");
        assert_eq!(w.c.ops().wait(op).await.expect("ends").state, OpState::Done);
    }
}

#[tokio::test]
async fn a_machine_in_a_network_goes_where_that_can_be() {
    let w = world(Send::Works).await;
    let want = |site: Option<&str>| CreateVm {
        image: Some(name("tiny")),
        site: site.map(name),
        network: Some("default".into()),
        ..CreateVm::default()
    };
    let plan = async |site| {
        let planned = w.c.create(&me(), want(site), Mode::DryRun).await;
        planned.map(|(accepted, _)| accepted.plan)
    };
    for protocol in [3, 5] {
        w.cafe.speaks.store(protocol, SeqCst);
        let f = plan(Some("cafe")).await.expect_err("too old");
        assert_eq!(f.code, Code::Conflict, "{f}");
        let words = format!("it speaks protocol {protocol}, and networks need 6");
        assert!(f.message.contains(&words), "{f}");
        assert!(plan(None).await.expect("at the other one").ends_with("at center"));
    }
    w.cafe.speaks.store(godwit_transfer::wire::Versions::OURS.max, SeqCst);
    plan(Some("cafe")).await.expect("it knows how");
    // The site says what it lacks with its next report.
    w.center.lacks.lock().expect("lock").extend(["nftables", "root"].map(name));
    let center: Arc<dyn SiteHost> = w.center.clone();
    w.c.refresh(&center).await.expect("reported");
    let f = plan(Some("center")).await.expect_err("it lacks something");
    assert!(f.message.contains("center cannot have its network: it lacks nftables, root"), "{f}");
    assert!(plan(None).await.expect("at the other one").ends_with("at cafe"));
    w.center.lacks.lock().expect("lock").clear();
    w.c.refresh(&center).await.expect("reported");
    plan(Some("center")).await.expect("it has all now");
}
