//! What tenants are kept from: each other's names, substrates, tokens and room.

use std::collections::HashSet;
use std::sync::Arc;

use godwit_site::SubstrateInfo;
use godwit_types::{Code, CodedError, SubstrateId, SubstrateKind, VmState};

use super::tests::*;
use super::tests_belief::docked;
use super::*;
use crate::access::{Principal, Role, default_tenant};
use crate::ops::OpKind;
use crate::registry::VmRecord;
use crate::registry::{OpRecord, Quota, SubstrateRecord, TenantRecord};

/// A user of a tenant, which is made if need be.
fn user(w: &World, tenant: &str, n: &str, role: Role) -> Principal {
    let (reg, tenant) = (w.c.registry(), name(tenant));
    if reg.people().tenant(&tenant).is_err() {
        reg.people().tenant_add(&me(), &TenantRecord::new(tenant.clone())).expect("tenant");
    }
    Principal::of(&reg.people().user_add(&me(), &tenant, &name(n), role).expect("user"))
}

/// A machine of `who` that runs.
fn machine(w: &World, who: &Principal, n: &str) -> VmRecord {
    let id = godwit_types::VmId::new();
    let made = OpRecord::begun(who, OpKind::VmCreate { vm: id, name: name(n) });
    let vm = VmRecord {
        id,
        tenant: who.tenant.clone(),
        state: VmState::Running,
        ..crate::registry::tests::vm(n)
    };
    let made = OpRecord { state: godwit_types::OpState::Done, ..made };
    w.c.registry().vm_add(&vm, Some(&made)).expect("machine");
    vm
}

/// An operation that docks `vm` under the name `called`, as it stands while it is under way.
fn docking(w: &World, who: &Principal, vm: &VmRecord, called: &str, site: &str) -> SubstrateId {
    let substrate = SubstrateId::new();
    let kind = OpKind::VmDock {
        vm: vm.id,
        name: vm.name.clone(),
        substrate,
        called: Some(name(called)),
        becomes: Some(SubstrateKind::Restricted),
        owner: None,
    };
    let mut op = OpRecord::begun(who, kind);
    op.journal.push(crate::registry::Step {
        what: crate::registry::StepKind::Dock { site: name(site), substrate },
        state: crate::registry::StepState::Begun,
    });
    w.c.registry().ops().put(&op).expect("entered");
    substrate
}

fn dock_as(n: &str) -> DockVm {
    DockVm { name: Some(name(n)), kind: None }
}

#[tokio::test]
async fn a_name_that_is_being_docked_is_taken_in_its_tenant() {
    let w = world(Send::Works).await;
    let (ann, bob) =
        (user(&w, "acme", "ann", Role::Member), user(&w, "other", "bob", Role::Member));
    let (a, b) = (machine(&w, &ann, "a"), machine(&w, &ann, "b"));
    machine(&w, &bob, "b");
    docking(&w, &ann, &a, "web", "center");
    let e = w.c.dock(&ann, "b", dock_as("web"), Mode::Act).expect_err("taken");
    assert_eq!(
        (e.code, e.message.as_str()),
        (Code::Exists, "substrate 'web' is being docked already")
    );
    assert_eq!(w.c.registry().vm(&b.id.to_string()).expect("there").state, VmState::Running);
    let e = w.c.exchange.begin_upload(&ann, &name("web"), None).err().expect("taken");
    assert_eq!(e.code, Code::Exists);
    w.c.dock(&ann, "b", dock_as("other"), Mode::DryRun).expect("another name");
    w.c.dock(&bob, "b", dock_as("web"), Mode::DryRun).expect("another tenant");
    // The same of one that a user brings.
    let upload = w.c.exchange.begin_upload(&ann, &name("file"), None).expect("begun");
    let e = w.c.dock(&ann, "b", dock_as("file"), Mode::Act).expect_err("taken");
    assert_eq!(e.code, Code::Exists);
    drop(upload);
    w.c.dock(&ann, "b", dock_as("file"), Mode::DryRun).expect("free again");
}

#[tokio::test]
async fn a_site_says_neither_whose_a_substrate_is_nor_who_may_use_it() {
    let w = world(Send::Works).await;
    let ann = user(&w, "acme", "ann", Role::Member);
    let vm = machine(&w, &ann, "a");
    let cafe: Arc<dyn SiteHost> = w.cafe.clone();
    let lie = |id, n: usize| SubstrateInfo {
        id,
        name: name("abiword"),
        kind: SubstrateKind::Public,
        owner: name("operator"),
        ..docked(n)
    };
    // What a user had docked there is what that user asked for.
    let id = docking(&w, &ann, &vm, "web", "cafe");
    let s = w.c.exchange.adopt_substrate(&name("cafe"), lie(id, 1)).expect("listed");
    assert_eq!((s.tenant.as_str(), s.owner.as_str(), s.name.as_str()), ("acme", "ann", "web"));
    assert_eq!(s.kind, SubstrateKind::Restricted, "public by the site's word");
    // What was asked of another site is not taken from this one.
    let id = docking(&w, &ann, &vm, "elsewhere", "center");
    w.cafe.substrates.lock().expect("lock").push(lie(id, 2));
    w.c.refresh(&cafe).await.expect("report");
    assert!(w.c.registry().substrate(&id.to_string()).is_err(), "nobody asked it to hold that");
    // Nor does what comes back for an operator's file belong to whom the site likes.
    let id = docking(&w, &ann, &vm, "third", "center");
    for info in [lie(id, 3), SubstrateInfo { owner: ann.id.clone(), ..lie(SubstrateId::new(), 4) }]
    {
        let s = w.c.exchange.adopt_import(&name("cafe"), info).expect("taken");
        assert_eq!((s.tenant, s.owner.as_str()), (default_tenant(), "operator"));
        assert_eq!(s.kind, SubstrateKind::Restricted);
    }
    // The center's own site is trusted with what a file says: an export is brought back as it was.
    let back = SubstrateInfo { name: name("back"), ..lie(SubstrateId::new(), 5) };
    let s = w.c.exchange.adopt_import(&name("center"), back).expect("taken");
    assert_eq!((s.kind, s.owner.as_str()), (SubstrateKind::Public, "operator"));
    // A user's file comes as that user's, under the id that the center drew.
    let upload = w.c.exchange.begin_upload(&ann, &name("file"), None).expect("begun");
    let s = w.c.exchange.adopt_substrate(&name("cafe"), lie(upload.want.id, 6)).expect("taken");
    assert_eq!((s.tenant.as_str(), s.kind), ("acme", SubstrateKind::Restricted));
    let e = Exchange::is_wanted(&name("cafe"), upload.want.id, &lie(id, 7)).expect_err("another");
    assert_eq!(e.code, Code::Damaged);
}

#[tokio::test]
async fn what_has_an_owner_that_nobody_knows_is_the_operators_alone() {
    let w = world(Send::Works).await;
    let dave = user(&w, "default", "dave", Role::Admin);
    let center: Arc<dyn SiteHost> = w.center.clone();
    let found = SubstrateInfo { owner: name("u-gone"), ..docked(1) };
    w.center.substrates.lock().expect("lock").push(found.clone());
    w.c.refresh(&center).await.expect("report");
    let s = w.c.registry().substrate(&found.id.to_string()).expect("listed");
    assert_eq!((s.kind, s.owner.as_str()), (SubstrateKind::Private, "operator"));
    let e =
        w.c.finder
            .substrate_for(&dave, crate::access::Action::Use, s.name.as_str())
            .expect_err("not his");
    assert_eq!(e.code, Code::Forbidden);
}

#[tokio::test]
async fn a_rebuilt_substrate_stays_its_owners_and_for_whom_it_was() {
    let w = world(Send::Works).await;
    let (ann, admin) =
        (user(&w, "acme", "ann", Role::Member), user(&w, "acme", "adm", Role::Admin));
    let old = private(&w, &ann, "mine");
    let new = SubstrateId::new();
    let kind = OpKind::SubstrateRebuild {
        vm: godwit_types::VmId::new(),
        name: old.name.clone(),
        old: old.id,
        new,
    };
    w.c.registry().ops().put(&OpRecord::begun(&admin, kind)).expect("entered");
    let info = SubstrateInfo { id: new, kind: SubstrateKind::Public, ..docked(9) };
    let s = w.c.exchange.adopt_substrate(&name("center"), info).expect("listed");
    assert_eq!((s.owner.as_str(), s.kind), ("ann", SubstrateKind::Private));
}

/// A private substrate of `who` at the center's site.
fn private(w: &World, who: &Principal, n: &str) -> SubstrateRecord {
    let info = SubstrateInfo {
        name: name(n),
        kind: SubstrateKind::Private,
        owner: who.id.clone(),
        ..docked(n.len())
    };
    w.center.substrates.lock().expect("lock").push(info.clone());
    w.c.exchange.adopt_substrate(&name("center"), info).expect("listed")
}

#[tokio::test]
async fn what_is_private_is_its_owners_alone_also_as_a_machine_and_by_no_other_token() {
    let w = world(Send::Works).await;
    let (ann, admin) =
        (user(&w, "acme", "ann", Role::Member), user(&w, "acme", "adm", Role::Admin));
    // Before there is anything private an admin makes the first token.
    let for_ann = || NewApiToken { user: Some(name("ann")), ..NewApiToken::default() };
    let first = w.c.accounts.token_create(&admin, for_ann()).expect("made").info;
    assert_eq!(first.made_by, Some(name("adm")), "she sees that another may have kept it");
    assert_eq!(w.c.accounts.tokens_for(&ann), [first]);
    let s = private(&w, &ann, "mine");
    let want = CreateVm {
        name: Some(name("diary")),
        substrate: Some(s.name.to_string()),
        ..CreateVm::default()
    };
    let (a, vm) = w.c.create(&ann, want, Mode::Act).await.expect("accepted");
    w.c.ops().wait(a.op.expect("op")).await.expect("ends");
    assert_eq!(vm.expect("made").private_of, Some(name("ann")));
    use crate::access::Action::{Change, Look, See, Use};
    for (action, allowed) in [(See, true), (Look, false), (Use, false), (Change, true)] {
        let found = w.c.finder.vm_for(&admin, action, "diary");
        assert_eq!(found.is_ok(), allowed, "{action:?}: {found:?}");
        w.c.finder.vm_for(&ann, action, "diary").expect("her own");
    }
    let e = w.c.accounts.token_create(&admin, for_ann()).expect_err("refused");
    assert_eq!(e.code, Code::Conflict, "{e}");
    assert!(e.message.contains("its tokens are made by itself"), "{e}");
    let own = w.c.accounts.token_create(&ann, NewApiToken::default()).expect("her own");
    assert_eq!(own.info.made_by, None);
    let e = w.c.accounts.user_delete(&admin, "ann").expect_err("busy");
    assert_eq!(e.code, Code::Conflict);
}

#[tokio::test]
async fn a_token_for_another_user_is_that_users_whatever_the_name() {
    let w = world(Send::Works).await;
    let reg = w.c.registry();
    user(&w, "acme", "ann", Role::Member);
    let taken = reg.people().user_add(&me(), &name("acme"), &name("operator"), Role::Member);
    assert_eq!(taken.expect_err("reserved").code(), Code::Exists);
    // Acting in acme, the operator asks for a token of a user who is called as it is there.
    let ann = Principal::of(
        &reg.people()
            .user_add(&me(), &default_tenant(), &name("ann"), Role::Operator)
            .expect("made"),
    );
    let in_acme = ann.at(&name("acme"));
    let made = w
        .c
        .accounts
        .token_create(&in_acme, NewApiToken { user: Some(name("ann")), ..NewApiToken::default() });
    let made = made.expect("made").info;
    assert_eq!((made.tenant.as_str(), made.role), ("acme", Role::Member), "an operator's token");
    let own = w.c.accounts.token_create(&in_acme, NewApiToken::default()).expect("made").info;
    assert_eq!((own.tenant, own.role), (default_tenant(), Role::Operator));
    let e = w.c.accounts.token_create(
        &me().at(&name("acme")),
        NewApiToken { user: Some(name("operator")), ..NewApiToken::default() },
    );
    assert_eq!(e.expect_err("none").code, Code::NotFound);
}

#[tokio::test]
async fn what_comes_of_a_token_that_ends_lives_no_longer() {
    let w = world(Send::Works).await;
    let ann = user(&w, "acme", "ann", Role::Member);
    let first = NewApiToken { lifetime_s: Some(3600), ..NewApiToken::default() };
    let first = w.c.accounts.token_create(&ann, first).expect("made");
    let end = first.info.expires.expect("it ends");
    let here = w.c.registry().people().principal(&first.token, UnixMs::now()).expect("good");
    for (lifetime_s, want) in [(None, Some(end)), (Some(7200), Some(end))] {
        let child = NewApiToken { lifetime_s, ..NewApiToken::default() };
        assert_eq!(w.c.accounts.token_create(&here, child).expect("made").info.expires, want);
    }
    let short = NewApiToken { lifetime_s: Some(60), ..NewApiToken::default() };
    assert!(w.c.accounts.token_create(&here, short).expect("made").info.expires < Some(end));
    assert_eq!(
        w.c.accounts.token_create(&ann, NewApiToken::default()).expect("made").info.expires,
        None
    );
}

#[test]
fn no_name_of_the_default_tenant_is_how_anothers_is_called_at_a_site() {
    let id = SubstrateId::new();
    let at_sites = |tenant: &str, n: &str| {
        authorize::name_at_sites(&name(tenant), &name(n), id).expect("a name").to_string()
    };
    let tail = super::rebuild::tail(id);
    assert_eq!(at_sites("default", "web"), "web");
    assert_eq!(at_sites("default", "debian-12"), "debian-12");
    assert_eq!(at_sites("acme", "web"), format!("web-{tail}"));
    assert_eq!(at_sites("default", "web-0a1b2c"), format!("web-0a1b2c-{tail}"));
}

#[tokio::test]
async fn whoever_hangs_up_while_a_program_is_handed_over_is_in_the_log() {
    let w = world(Send::Works).await;
    let ann = user(&w, "acme", "ann", Role::Member);
    machine(&w, &ann, "a");
    w.center.hung.store(true, std::sync::atomic::Ordering::SeqCst);
    let program = godwit_site::GuestProgram {
        path: "/bin/true".into(),
        args: Vec::new(),
        input: Vec::new().into(),
    };
    let asked = w.c.programs.exec(&ann, "a", program, Duration::from_secs(60));
    tokio::time::timeout(Duration::from_millis(50), asked).await.expect_err("it does not answer");
    let last = w.c.accounts.audit_for(&me(), 1, None).expect("read").remove(0);
    assert_eq!(
        (last.tenant.as_str(), last.user.as_str(), last.action.as_str(), last.outcome.as_str()),
        ("acme", "ann", "vm exec", "begun")
    );
}

#[tokio::test]
async fn what_comes_in_is_counted_while_it_comes() {
    let w = world(Send::Works).await;
    let ann = user(&w, "acme", "ann", Role::Member);
    let quota = Quota { pool_bytes: Some(1000), ..Quota::default() };
    w.c.registry().quotas().set(&me(), &ann.tenant, quota).expect("set");
    let e = w.c.exchange.begin_upload(&ann, &name("large"), Some(1001)).err().expect("too much");
    assert_eq!(e.code, Code::NoRoom);
    let a = w.c.exchange.begin_upload(&ann, &name("a"), Some(900)).expect("room");
    let b = w.c.exchange.begin_upload(&ann, &name("b"), None).expect("its length is not known");
    a.count(900).expect("room");
    b.count(100).expect("room");
    assert_eq!(b.count(1).expect_err("together too much").code, Code::NoRoom);
    drop(a);
    b.count(100).expect("room again");
}

#[tokio::test]
async fn what_concerns_the_whole_cloud_is_not_there_for_users_of_the_default_tenant() {
    let w = world(Send::Works).await;
    let dave = user(&w, "default", "dave", Role::Admin);
    user(&w, "acme", "ann", Role::Member);
    let mut cloud = Vec::new();
    for kind in [
        OpKind::PoolCheck { site: name("center") },
        OpKind::ImageBuild { site: name("center"), image: name("tiny") },
    ] {
        let op = OpRecord::begun(&me(), kind);
        w.c.registry().ops().put(&op).expect("entered");
        cloud.push(op.id);
    }
    let ours =
        OpRecord::begun(&dave, OpKind::VmStop { vm: godwit_types::VmId::new(), name: name("web") });
    w.c.registry().ops().put(&ours).expect("entered");
    w.c.accounts.note_of_cloud(&me(), "site revoke", "cafe");
    use crate::access::Action::{Change, See};
    for id in cloud {
        for action in [See, Change] {
            let e = w.c.finder.op_for(&dave, action, id).expect_err("not there");
            assert_eq!(e.code, Code::NotFound, "{e}");
        }
        assert_eq!(w.c.finder.cancel(&dave, id).expect_err("not there").code, Code::NotFound);
        w.c.finder.op_for(&me(), See, id).expect("the operator's");
    }
    let seen: Vec<_> = w.c.finder.ops_for(&dave).expect("list").into_iter().map(|o| o.id).collect();
    assert_eq!(seen, [ours.id]);
    let actions = |who: &Principal| {
        let log = w.c.accounts.audit_for(who, 100, None).expect("read");
        log.into_iter().map(|e| format!("{} {}", e.action, e.object)).collect::<Vec<_>>()
    };
    let log = actions(&dave);
    for foreign in ["acme", "cafe", "pool check", "image build"] {
        assert!(!log.iter().any(|e| e.contains(foreign)), "{foreign}: {log:?}");
    }
    assert!(log.iter().any(|e| e.starts_with("vm stop web")), "{log:?}");
    let all = actions(&me());
    for there in ["tenant create acme", "site revoke cafe", "pool check center"] {
        assert!(all.iter().any(|e| e.starts_with(there)), "{there}: {all:?}");
    }
}

#[tokio::test]
async fn the_owner_of_a_granted_substrate_finds_in_its_log_who_took_it_out() {
    let w = world(Send::Works).await;
    let (ann, bob) = (user(&w, "acme", "ann", Role::Admin), user(&w, "other", "bob", Role::Admin));
    let info = SubstrateInfo { owner: ann.id.clone(), name: name("lent"), ..docked(1) };
    let s = w.c.exchange.adopt_substrate(&name("center"), info).expect("listed");
    w.c.accounts.note_substrate(&bob, "substrate export", &s);
    for (who, object) in [(&ann, "lent by a user of tenant other"), (&bob, "lent")] {
        let log = w.c.accounts.audit_for(who, 1, None).expect("read");
        assert_eq!((log[0].action.as_str(), log[0].object.as_str()), ("substrate export", object));
    }
}

#[tokio::test]
async fn equal_refusals_are_one_entry_of_the_log() {
    let w = world(Send::Works).await;
    let ann = user(&w, "acme", "ann", Role::Admin);
    for _ in 0..100 {
        w.c.accounts.note_refused(&ann, "GET /metrics");
    }
    let log = w.c.accounts.audit_for(&ann, 100, None).expect("read");
    assert_eq!(log.iter().filter(|e| e.action == "request").count(), 1, "{log:?}");
    assert!(w.c.accounts.audit_for(&ann, 0, None).expect("read").is_empty());
}

/// A machine of `who` that runs, made of the substrate `key`.
async fn activated(w: &World, who: &Principal, n: &str, key: &str) -> VmRecord {
    let want =
        CreateVm { name: Some(name(n)), substrate: Some(key.to_owned()), ..CreateVm::default() };
    let (a, vm) = w.c.create(who, want, Mode::Act).await.expect("accepted");
    w.c.ops().wait(a.op.expect("op")).await.expect("ends");
    vm.expect("made")
}

#[tokio::test]
async fn what_is_private_is_docked_as_private_and_no_colleague_cancels_that() {
    let w = world(Send::Works).await;
    let (ann, bob) = (user(&w, "acme", "ann", Role::Member), user(&w, "acme", "bob", Role::Member));
    private(&w, &ann, "mine");
    let vm = activated(&w, &ann, "diary", "mine").await;
    w.center.hung.store(true, std::sync::atomic::Ordering::SeqCst);
    let how = DockVm { name: Some(name("kept")), kind: None };
    let op = w.c.dock(&ann, "diary", how, Mode::Act).expect("accepted").op.expect("op");
    match w.c.registry().ops().get(op).expect("there").kind {
        OpKind::VmDock { becomes, owner, .. } => {
            assert_eq!(becomes, Some(SubstrateKind::Private));
            assert_eq!(owner, Some(name("ann")));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(w.c.registry().vm(&vm.id.to_string()).expect("there").state, VmState::Docking);
    assert_eq!(w.c.finder.cancel(&bob, op).expect_err("not his").code, Code::Forbidden);
    w.c.finder.cancel(&ann, op).expect("her own");
}

#[tokio::test]
async fn an_operator_in_another_tenant_makes_nothing_in_the_name_of_a_user_there() {
    let w = world(Send::Works).await;
    let ann = user(&w, "acme", "ann", Role::Member);
    // Called the same, and somebody else: a user and an operator of the default tenant.
    user(&w, "default", "ann", Role::Member);
    let bob = user(&w, "default", "bob", Role::Operator);
    user(&w, "acme", "bob", Role::Member);
    private(&w, &ann, "mine");
    let vm = activated(&w, &me(), "copy", "acme/mine").await;
    assert_eq!((vm.tenant.as_str(), vm.private_of), ("default", Some(name("operator"))));
    let upload =
        w.c.exchange.begin_upload(&bob.at(&ann.tenant), &name("file"), None).expect("begun");
    assert_eq!(upload.want.owner.as_str(), "operator");
    let vm = machine(&w, &ann, "a");
    let accepted = w.c.dock(&bob, &format!("acme/{}", vm.name), dock_as("web"), Mode::Act);
    let op = accepted.expect("accepted").op.expect("op");
    let kind = w.c.registry().ops().get(op).expect("there").kind;
    assert!(matches!(kind, OpKind::VmDock { owner: Some(o), .. } if o.as_str() == "operator"));
}

#[tokio::test]
async fn a_name_that_is_the_id_of_anothers_machine_reveals_nothing() {
    let w = world(Send::Works).await;
    let (ann, bob) =
        (user(&w, "acme", "ann", Role::Member), user(&w, "other", "bob", Role::Member));
    let id = machine(&w, &ann, "a").id.to_string();
    let want = CreateVm { name: Some(name(&id)), image: Some(name("tiny")), ..CreateVm::default() };
    w.c.create(&bob, want, Mode::DryRun).await.expect("as any other name");
}

#[tokio::test]
async fn a_site_that_takes_a_substrate_learns_whose_pages_it_may_use() {
    let w = world(Send::Works).await;
    let held = |n: &str, tenant: &str, kind, granted: &[&str], at: &str| {
        let s = SubstrateRecord {
            tenant: name(tenant),
            kind,
            granted: granted.iter().map(|t| name(t)).collect(),
            holders: [name(at)].into(),
            content: Some(godwit_types::Hash::of(n.as_bytes())),
            ..crate::registry::tests::substrate(n)
        };
        w.c.registry().substrate_add(&s).expect("added");
        s
    };
    let (restricted, private) = (SubstrateKind::Restricted, SubstrateKind::Private);
    let ann = user(&w, "acme", "ann", Role::Member);
    for tenant in ["other", "third"] {
        user(&w, tenant, "bob", Role::Member);
    }
    let public = held("public", "other", SubstrateKind::Public, &[], "cafe");
    let own = held("own", "acme", restricted, &[], "cafe");
    let granted = held("granted", "other", restricted, &["acme"], "cafe");
    held("foreign", "other", restricted, &[], "cafe");
    held("diary", "acme", private, &[], "cafe");
    held("elsewhere", "acme", restricted, &[], "center");
    let offered = async |s: &SubstrateRecord| {
        w.cafe.opened.lock().expect("lock").clear();
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
        let op = w.c.ops().start(&ann, kind, job).expect("started");
        w.c.ops().wait(op).await.expect("ends");
        let opened = w.cafe.opened.lock().expect("lock").clone();
        let [godwit_site::StreamRequest::SubstrateTakeAmong(t)] = &opened[..] else {
            panic!("{opened:?}")
        };
        assert_eq!(t.content, s.content);
        t.among.iter().copied().collect::<HashSet<_>>()
    };
    let all = |all: &[&SubstrateRecord]| all.iter().map(|s| s.id).collect::<HashSet<_>>();
    let mine = held("mine", "acme", restricted, &[], "center");
    assert_eq!(offered(&mine).await, all(&[&public, &own, &granted]));
    // Whoever it is granted to reads it, too, and what is public everybody.
    let shared = held("shared", "acme", restricted, &["third"], "center");
    assert_eq!(offered(&shared).await, all(&[&public]));
    let clean = held("clean", "default", SubstrateKind::Public, &[], "center");
    assert_eq!(offered(&clean).await, all(&[&public]));
}

#[tokio::test]
async fn of_many_that_rebuild_one_substrate_at_once_one_does() {
    for kind in [SubstrateKind::Private, SubstrateKind::Restricted] {
        let w = world(Send::Works).await;
        let ann = user(&w, "acme", "ann", Role::Member);
        let owner = ann.id.clone();
        let info = SubstrateInfo { name: name("mine"), kind, owner, ..docked(4) };
        w.center.substrates.lock().expect("lock").push(info.clone());
        w.c.exchange.adopt_substrate(&name("center"), info).expect("listed");
        let taken: Vec<_> = std::thread::scope(|scope| {
            let at = tokio::runtime::Handle::current();
            let all: Vec<_> = (0..30)
                .map(|_| {
                    let (c, ann, at) = (w.c.clone(), ann.clone(), at.clone());
                    // What they begin waits until all have asked: this thread runs it.
                    scope.spawn(move || at.block_on(c.substrate_rebuild(&ann, "mine", Mode::Act)))
                })
                .collect();
            all.into_iter().map(|t| t.join().expect("no panic")).collect()
        });
        let refused = taken.iter().filter_map(|t| t.as_ref().err());
        let codes: Vec<_> = refused.map(|f| f.code).collect();
        assert_eq!(codes.len(), 29, "{kind}: {codes:?}");
        assert!(codes.iter().all(|c| matches!(c, Code::Exists | Code::Conflict)), "{codes:?}");
        assert_eq!(w.c.registry().vms().expect("list").len(), 1, "{kind}");
    }
}

#[tokio::test]
async fn a_machine_of_a_rebuild_counts_its_disk_also_at_a_center_that_remembers_none() {
    let w = world(Send::Works).await;
    let ann = user(&w, "acme", "ann", Role::Member);
    let (owner, kind) = (ann.id.clone(), SubstrateKind::Restricted);
    let info = SubstrateInfo { name: name("mine"), kind, owner, ..docked(4) };
    w.center.substrates.lock().expect("lock").push(info.clone());
    w.c.exchange.adopt_substrate(&name("center"), info).expect("listed");
    // The disk of the machine that it makes is 4 GiB, and the tenant may have less.
    let quota = Quota { disk_bytes: Some(3 << 30), ..Quota::default() };
    w.c.registry().quotas().set(&me(), &name("acme"), quota).expect("set");
    let f = w.c.substrate_rebuild(&ann, "mine", Mode::Act).await.expect_err("over its quota");
    assert_eq!(f.code, Code::NoRoom, "{f}");
    assert!(f.message.contains("bytes of machines' disks"), "{f}");
    let quota = Quota { disk_bytes: Some(5 << 30), ..Quota::default() };
    w.c.registry().quotas().set(&me(), &name("acme"), quota).expect("set");
    w.c.substrate_rebuild(&ann, "mine", Mode::Act).await.expect("begun");
    let vm = w.c.registry().vms().expect("list").remove(0);
    assert_eq!(vm.disk_bytes, Some(4 << 30));
}

#[tokio::test]
async fn who_deletes_a_substrate_is_in_the_log_of_its_tenant() {
    let w = world(Send::Works).await;
    let (ann, bob) = (user(&w, "acme", "ann", Role::Member), user(&w, "other", "bob", Role::Admin));
    let s = private(&w, &ann, "mine");
    w.c.pool
        .substrate_delete(&bob, &s.id.to_string(), Mode::Act)
        .await
        .expect_err("not there for him");
    w.c.pool.substrate_delete(&ann, "mine", Mode::DryRun).await.expect("would");
    let deletes = |who: &Principal| {
        let log = w.c.accounts.audit_for(who, 100, None).expect("read");
        let of = |e: &crate::registry::AuditEntry| e.action.starts_with("substrate delete");
        log.into_iter().filter(of).collect::<Vec<_>>()
    };
    let adm = user(&w, "acme", "adm", Role::Admin);
    assert!(deletes(&adm).is_empty(), "nothing was deleted yet");
    w.c.pool.substrate_delete(&me(), "acme/mine", Mode::Act).await.expect("deleted");
    let log = deletes(&adm);
    assert!(!log.is_empty(), "its tenant sees it");
    for e in &log {
        assert_eq!((e.tenant.as_str(), e.user.as_str()), ("acme", "operator"), "{e:?}");
        assert_eq!(e.object, "mine", "{e:?}");
    }
    assert!(deletes(&bob).is_empty(), "and nobody else's does");
}
