use super::*;

fn name(s: &str) -> Name {
    Name::new(s).expect("name")
}

fn who(role: Role) -> Principal {
    let id = name("u-1");
    Principal {
        user: name("ann"),
        id,
        tenant: name("acme"),
        role,
        narrowed: false,
        token: None,
        until: None,
        by: None,
    }
}

/// Lowest role that may, `-` for nobody but an operator, `x` where it is not there.
fn lowest(action: Action, object: &Object<'_>) -> &'static str {
    let mut found = None;
    let mut hidden = 0;
    for role in [Role::Viewer, Role::Member, Role::Admin] {
        match (may(&who(role), action, object), found) {
            (Ok(()), None) => found = Some(role.as_str()),
            (Ok(()), Some(_)) => {}
            (Err(why), None) => hidden += usize::from(why == Refusal::Hidden),
            (Err(_), Some(lower)) => panic!("{lower} may, {role} may not: {action:?} {object:?}"),
        }
    }
    // For an operator there is no refusal.
    assert_eq!(may(&who(Role::Operator), action, object), Ok(()));
    match found {
        Some(role) => role,
        None if hidden == 3 => "x",
        None => "-",
    }
}

/// Every kind of object, own and foreign, with the lowest role for each of [`Action::ALL`]:
/// see, look, use, create, change, publish.
#[test]
fn each_role_may_what_the_table_says_and_nothing_else() {
    let (acme, other, ann, bob) = (name("acme"), name("other"), name("ann"), name("bob"));
    let op = operator();
    let (none, granted) = (BTreeSet::new(), BTreeSet::from([acme.clone()]));
    let substrate =
        |tenant, owner, kind, granted| Object::Substrate { tenant, owner, kind, granted };
    let token = |tenant, user, role| Object::Token { tenant, user, role };
    let machine = |tenant, private_of| Object::Machine { tenant, private_of };
    let user = |tenant, role| Object::User { tenant, role };
    use SubstrateKind::{Private, Public, Restricted};
    let rows: &[(&str, Object<'_>, [&str; 6])] = &[
        ("machine", machine(&acme, None), ["viewer", "viewer", "member", "member", "member", "-"]),
        (
            "own private machine",
            machine(&acme, Some(&ann)),
            ["viewer", "viewer", "member", "member", "member", "-"],
        ),
        (
            "a colleague's private machine",
            machine(&acme, Some(&bob)),
            ["viewer", "-", "-", "member", "admin", "-"],
        ),
        ("foreign machine", machine(&other, None), ["x"; 6]),
        ("foreign private machine", machine(&other, Some(&ann)), ["x"; 6]),
        ("operation on the cloud", Object::CloudOperation, ["x"; 6]),
        (
            "operation",
            Object::Operation { tenant: &acme },
            ["viewer", "-", "-", "-", "member", "-"],
        ),
        (
            "network",
            Object::Network { tenant: &acme },
            ["viewer", "-", "member", "member", "member", "-"],
        ),
        ("foreign network", Object::Network { tenant: &other }, ["x"; 6]),
        ("foreign operation", Object::Operation { tenant: &other }, ["x"; 6]),
        (
            "own restricted",
            substrate(&acme, &bob, Restricted, &none),
            ["viewer", "-", "member", "member", "member", "-"],
        ),
        (
            "own public",
            substrate(&acme, &ann, Public, &none),
            ["viewer", "-", "member", "-", "-", "-"],
        ),
        (
            "own private",
            substrate(&acme, &ann, Private, &none),
            ["viewer", "-", "member", "member", "member", "-"],
        ),
        (
            "a colleague's private",
            substrate(&acme, &bob, Private, &none),
            ["viewer", "-", "-", "member", "admin", "-"],
        ),
        (
            "foreign public",
            substrate(&other, &bob, Public, &none),
            ["viewer", "-", "member", "-", "-", "-"],
        ),
        ("foreign restricted", substrate(&other, &bob, Restricted, &none), ["x"; 6]),
        (
            "granted restricted",
            substrate(&other, &bob, Restricted, &granted),
            ["viewer", "-", "member", "member", "-", "-"],
        ),
        // A user of the same name elsewhere is another user, and private is not granted.
        ("foreign private", substrate(&other, &ann, Private, &granted), ["x"; 6]),
        ("image", Object::Image, ["viewer", "-", "member", "-", "-", "-"]),
        ("site", Object::Site, ["viewer", "-", "member", "-", "-", "-"]),
        ("cloud", Object::Cloud, ["-"; 6]),
        ("audit", Object::Audit { tenant: &acme }, ["admin", "-", "-", "-", "-", "-"]),
        ("foreign audit", Object::Audit { tenant: &other }, ["x"; 6]),
        ("own tenant", Object::Tenant { name: &acme }, ["viewer", "-", "-", "-", "-", "-"]),
        ("other tenant", Object::Tenant { name: &other }, ["x"; 6]),
        ("viewer", user(&acme, Role::Viewer), ["viewer", "-", "-", "admin", "admin", "-"]),
        ("admin", user(&acme, Role::Admin), ["viewer", "-", "-", "admin", "admin", "-"]),
        ("an operator", user(&acme, Role::Operator), ["viewer", "-", "-", "-", "-", "-"]),
        ("foreign user", user(&other, Role::Viewer), ["x"; 6]),
        (
            "own token",
            token(&acme, &ann, Role::Viewer),
            ["viewer", "-", "-", "viewer", "viewer", "-"],
        ),
        (
            "own token of a member",
            token(&acme, &ann, Role::Member),
            ["viewer", "-", "-", "member", "member", "-"],
        ),
        (
            "own token of an operator",
            token(&acme, &ann, Role::Operator),
            ["viewer", "-", "-", "-", "-", "-"],
        ),
        (
            "a colleague's token",
            token(&acme, &bob, Role::Viewer),
            ["admin", "-", "-", "admin", "admin", "-"],
        ),
        ("the operator's token", token(&acme, &op, Role::Viewer), ["x"; 6]),
        ("foreign token", token(&other, &ann, Role::Viewer), ["x"; 6]),
    ];
    for (what, object, wanted) in rows {
        let found = Action::ALL.map(|a| lowest(a, object));
        assert_eq!(found, *wanted, "{what}: see, look, use, create, change, publish");
    }
}

#[test]
fn names_that_are_fixed_are_names_and_roles_are_read_as_they_are_written() {
    assert_eq!(Principal::operator().tenant.as_str(), DEFAULT_TENANT);
    assert_eq!(Principal::operator().user.as_str(), OPERATOR);
    for role in Role::ALL {
        assert_eq!(role.to_string().parse::<Role>(), Ok(role));
        assert_eq!(serde_json::to_value(role).expect("json"), role.as_str());
    }
    assert!("root".parse::<Role>().is_err());
    let f = forbidden(&who(Role::Viewer), Action::Use, &Object::Image);
    assert_eq!(f, "user 'ann', viewer of tenant 'acme', may not use images");
}

#[test]
fn an_operator_lists_all_unless_it_names_a_tenant() {
    let (acme, other) = (name("acme"), name("other"));
    let mut op = Principal::operator();
    assert!(op.lists(&acme) && op.lists(&other));
    (op.tenant, op.narrowed) = (acme.clone(), true);
    assert!(op.lists(&acme) && !op.lists(&other));
    assert!(who(Role::Admin).lists(&acme) && !who(Role::Admin).lists(&other));
}
