//! Tests of the cluster's facts: what counts as a change, and in which order updates apply.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use raven_api::GatewaySpec;

use super::*;

fn cluster() -> Cluster {
    Cluster::new(DecisionSettings { rules: true, ..Default::default() })
}

fn gateway(name: &str, version: &str) -> Gateway {
    let metadata = ObjectMeta { name: Some(name.into()), resource_version: Some(version.into()), ..Default::default() };
    Gateway { metadata, spec: GatewaySpec::default(), status: None }
}

fn readable(name: &str, version: &str) -> Guarded<Gateway> {
    Guarded(Ok(gateway(name, version)))
}

fn unreadable(name: &str) -> Guarded<Gateway> {
    let metadata = ObjectMeta { name: Some(name.into()), ..Default::default() };
    Guarded(Err(Unreadable { error: "spec.exposeType: unknown variant".into(), metadata }))
}

#[test]
fn last_known_version_of_an_unreadable_gateway_stays_in_use() {
    let mut cluster = cluster();
    let names = |cluster: &Cluster| {
        let snapshot = cluster.snapshot();
        let names = |keys: Vec<&GatewayName>| keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        (names(snapshot.inputs().gateways.keys().collect()), names(snapshot.unreadable.keys().collect()))
    };
    cluster.absorb(Update::Gateway(Event::Apply(readable("a", "1"))));
    assert!(cluster.absorb(Update::Gateway(Event::Apply(unreadable("a")))), "it has to be reported");
    assert_eq!(names(&cluster), ("a".to_owned(), "a".to_owned()));
    let listing = [unreadable("a"), unreadable("new"), readable("b", "2")];
    cluster.absorb(Update::Gateway(Event::Init));
    for gateway in listing {
        cluster.absorb(Update::Gateway(Event::InitApply(gateway)));
    }
    cluster.absorb(Update::Gateway(Event::InitDone));
    assert_eq!(names(&cluster), ("a b".to_owned(), "a new".to_owned()));
    cluster.absorb(Update::Gateway(Event::Apply(readable("a", "3"))));
    cluster.absorb(Update::Gateway(Event::Delete(unreadable("new"))));
    assert_eq!(names(&cluster), ("a b".to_owned(), String::new()));
}

#[test]
fn watch_event_older_than_an_own_write_is_ignored() {
    let mut cluster = cluster();
    assert!(cluster.absorb(Update::Gateway(Event::Apply(readable("a", "5")))));
    assert!(cluster.absorb(Update::Written(vec![gateway("a", "10")], oneshot::channel().0)));
    assert!(!cluster.absorb(Update::Gateway(Event::Apply(readable("a", "7")))));
    assert!(cluster.absorb(Update::Gateway(Event::Apply(readable("a", "11")))));
}

#[test]
fn own_writes_do_not_advance_the_revision() {
    let mut cluster = cluster();
    cluster.absorb(Update::Gateway(Event::Apply(readable("a", "5"))));
    let before = cluster.snapshot().revision;
    assert!(cluster.absorb(Update::Written(vec![gateway("a", "10")], oneshot::channel().0)));
    assert_eq!(cluster.snapshot().revision, before);
    assert!(cluster.absorb(Update::Gateway(Event::Apply(readable("a", "11")))));
    assert_eq!(cluster.snapshot().revision, before + 1);
}

#[test]
fn listing_replaces_all_facts_at_once() {
    let mut cluster = cluster();
    cluster.absorb(Update::Gateway(Event::Apply(readable("gone", "1"))));
    assert!(!cluster.absorb(Update::Gateway(Event::Init)));
    assert!(!cluster.absorb(Update::Gateway(Event::InitApply(readable("new", "2")))));
    assert!(cluster.snapshot().inputs().gateways.contains_key(&"gone".into()));
    assert!(cluster.absorb(Update::Gateway(Event::InitDone)));
    assert_eq!(cluster.snapshot().inputs().gateways.keys().map(GatewayName::as_str).collect::<Vec<_>>(), ["new"]);
}

#[test]
fn heartbeat_changes_no_fact() {
    let mut cluster = cluster();
    let mut node = Node { metadata: ObjectMeta { name: Some("n".into()), ..Default::default() }, ..Default::default() };
    assert!(cluster.absorb(Update::Node(Event::Apply(Guarded(Ok(node.clone()))))));
    node.metadata.resource_version = Some("77".into());
    assert!(!cluster.absorb(Update::Node(Event::Apply(Guarded(Ok(node))))));
}

#[test]
fn node_that_becomes_unreadable_counts_as_absent() {
    let mut cluster = cluster();
    let node = |heartbeat: &str| {
        let text = format!(
            r#"{{"metadata":{{"name":"n"}},"status":{{"conditions":[{{"type":"X","status":"True","lastHeartbeatTime":"{heartbeat}"}}]}}}}"#
        );
        serde_json::from_str(&text).expect("never an error")
    };
    assert!(cluster.absorb(Update::Node(Event::Apply(node("2026-01-01T00:00:00Z")))));
    assert_eq!(cluster.snapshot().inputs().nodes.len(), 1);
    assert!(cluster.absorb(Update::Node(Event::Apply(node("9999-12-31T23:59:59Z")))));
    assert_eq!(cluster.snapshot().inputs().nodes.len(), 0);
}

#[test]
fn complete_once_every_kind_is_listed_or_unavailable() {
    let mut cluster = cluster();
    cluster.absorb(Update::Gateway(Event::InitDone));
    cluster.absorb(Update::Node(Event::InitDone));
    cluster.absorb(Update::PoolsAbsent);
    for other in [
        Update::BlocksAbsent,
        Update::BalancersUnavailable,
        Update::GatewayNodesUnavailable,
        Update::ServiceCidrsUnavailable,
        Update::ApiServerUnavailable,
        Update::SwitchesUnavailable,
    ] {
        assert!(!cluster.snapshot().complete);
        cluster.absorb(other);
    }
    assert!(cluster.snapshot().complete);
    assert!(!cluster.snapshot().proxies_complete, "the L7 half does not act on unavailable kinds");
}

#[test]
fn protected_prefixes_stay_while_they_are_unavailable() {
    let mut cluster = Cluster::new(DecisionSettings {
        rules: true,
        service_cidrs: vec!["10.97.0.0/16".parse().expect("a prefix")],
        ..Default::default()
    });
    let range = serde_json::from_value(
        serde_json::json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}}),
    );
    assert!(cluster.absorb(Update::ServiceCidr(Event::Apply(range.expect("a ServiceCIDR")))));
    cluster.absorb(Update::ServiceCidr(Event::InitDone));
    let known =
        |cluster: &Cluster| cluster.snapshot().inputs().services.iter().map(ToString::to_string).collect::<Vec<_>>();
    cluster.absorb(Update::ServiceCidr(Event::Init));
    assert!(!cluster.absorb(Update::ServiceCidrsUnavailable));
    assert_eq!(known(&cluster), ["10.97.0.0/16"]);
}
