//! Tests of the three [pool rules](crate::gateway::rules).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry};
use raven_api::gateway::ExposeType;
use raven_api::pool::NodePoolSpec;

use super::build::*;
use crate::gateway::facts::UnreadableGateway;

#[test]
fn cloud_nodes_are_one_pool_and_each_edge_node_is_its_own() {
    let cluster = Cluster::with_rules()
        .node(node("c1", "10.1.1.0/24"))
        .node(node("c2", "10.1.2.0/24"))
        .node(edge(node("e1", "10.2.1.0/24")))
        .node(edge(node("e2", "10.3.1.0/24")));
    let cluster = cluster.apply(1).apply(2);
    assert_eq!(
        cluster.0.gateways.keys().map(super::super::facts::GatewayName::as_str).collect::<Vec<_>>(),
        ["cloud", "node-e1", "node-e2"]
    );
    assert_eq!(cluster.nodes("cloud"), ["c1", "c2"]);
    assert_eq!(cluster.resource("cloud").spec.expose_type, ExposeType::PublicIP);
    assert_eq!(cluster.nodes("node-e2"), ["e2"]);
    cluster.assert_condition("node-e2", "Ready", "True", "Ready", "");
}

/// OpenYurt's default, a missing field, says nothing: its users have pools of one LAN with it.
#[test]
fn each_node_of_a_node_pool_without_interconnectivity_is_a_pool() {
    let spec = |type_: &str, inter_connectivity| NodePoolSpec { type_: type_.to_owned(), inter_connectivity };
    let shop = |name: &str, cidr: &str| labelled(edge(node(name, cidr)), raven_api::LABEL_NODE_POOL, "shops");
    let names = |inter_connectivity| -> Vec<String> {
        let cluster = Cluster::with_rules()
            .pool_with("shops", spec("Edge", inter_connectivity))
            .pool_with("vpc", spec("Cloud", Some(false)))
            .node(shop("s1", "10.2.1.0/24"))
            .node(shop("s2", "10.2.2.0/24"))
            .node(labelled(node("c1", "10.1.1.0/24"), raven_api::LABEL_NODE_POOL, "vpc"))
            .apply(1)
            .apply(2);
        cluster.0.gateways.keys().map(ToString::to_string).collect()
    };
    assert_eq!(names(Some(false)), ["node-s1", "node-s2", "pool-vpc"]);
    assert_eq!(names(Some(true)), ["pool-shops", "pool-vpc"]);
    assert_eq!(names(None), ["pool-shops", "pool-vpc"]);
}

#[test]
fn node_pool_is_one_pool_and_disables_the_rule_of_its_side() {
    let pooled = |name: &str, cidr: &str| labelled(edge(node(name, cidr)), raven_api::LABEL_NODE_POOL, "hangzhou");
    let cluster = Cluster::with_rules()
        .pool("hangzhou", true)
        .node(node("c1", "10.1.1.0/24"))
        .node(pooled("e1", "10.2.1.0/24"))
        .node(pooled("e2", "10.2.2.0/24"))
        .node(edge(node("lost", "10.3.1.0/24")));
    let strays = cluster.decide().strays;
    assert!(strays.len() == 1 && strays[0].contains("lost"), "{strays:?}");
    let cluster = cluster.apply(1).apply(2);
    assert_eq!(cluster.nodes("pool-hangzhou"), ["e1", "e2"]);
    assert_eq!(cluster.nodes("cloud"), ["c1"]);
    assert_eq!(cluster.0.gateways.len(), 2);
}

#[test]
fn user_written_gateway_takes_nodes_from_a_rule() {
    let cluster = Cluster::with_rules().node(edge(node("e1", "10.2.1.0/24"))).apply(1).apply(2);
    assert_eq!(cluster.nodes("node-e1"), ["e1"]);
    let cluster = cluster.gateway(selecting(gateway("mine", 9), raven_api::LABEL_EDGE_WORKER, "true")).apply(3);
    assert_eq!(cluster.0.gateways.keys().map(super::super::facts::GatewayName::as_str).collect::<Vec<_>>(), ["mine"]);
    assert_eq!(cluster.nodes("mine"), ["e1"]);
    cluster.assert_condition("mine", "Accepted", "True", "Accepted", "");
}

#[test]
fn user_written_gateway_without_nodes_is_not_deleted() {
    let cluster = Cluster::with_rules().gateway(gateway("mine", 1)).gateway(by_rule(gateway("node-gone", 2)));
    assert_eq!(cluster.decide().delete, ["node-gone".into()]);
}

#[test]
fn rules_wait_while_an_unreadable_gateway_may_claim_the_nodes() {
    let mut cluster =
        Cluster::with_rules().gateway(by_rule(gateway("node-gone", 2))).node(edge(node("e1", "10.2.1.0/24")));
    let unreadable = |name: &str| {
        let gateway = UnreadableGateway { error: "missing field `spec`".to_owned(), uid: None };
        [(name.into(), gateway.into())].into()
    };
    cluster.0.unreadable = unreadable("unknown");
    let decided = cluster.decide();
    assert_eq!((decided.create.len(), decided.delete.len()), (0, 0));
    cluster.0.unreadable = unreadable("node-gone");
    let decided = cluster.decide();
    assert_eq!(
        (decided.create.len(), decided.delete.len()),
        (1, 0),
        "its last version is known, and too old to delete it"
    );
    cluster.0.unreadable.clear();
    let decided = cluster.decide();
    assert_eq!((decided.create.len(), decided.delete.len()), (1, 1));
}

#[test]
fn rule_uses_a_second_name_beside_a_user_written_gateway() {
    let cluster =
        Cluster::with_rules().gateway(selecting(gateway("cloud", 1), "zone", "a")).node(node("c1", "10.1.1.0/24"));
    let created = cluster.decide().create;
    assert_eq!(created[0].metadata.name.as_deref(), Some("cloud-auto"));
}

#[test]
fn rule_gateway_whose_selector_a_person_sets_is_the_persons() {
    let cluster = Cluster::with_rules().node(labelled(edge(node("e1", "10.2.1.0/24")), "zone", "a")).apply(1).apply(2);
    let managed = |fields: &str| ManagedFieldsEntry {
        manager: Some("kubectl-client-side-apply".to_owned()),
        fields_v1: Some(FieldsV1(serde_json::from_str(fields).expect("fields"))),
        ..Default::default()
    };
    let edited = |fields: &str, zone: &str| {
        let mut gateway = selecting(by_rule(gateway("node-e1", 1)), "zone", zone);
        gateway.metadata.managed_fields = Some(vec![managed(fields)]);
        cluster.clone().gateway(gateway)
    };
    let mine = edited(r#"{"f:spec":{"f:nodeSelector":{"f:matchLabels":{"f:zone":{}}}}}"#, "a").apply(3);
    assert_eq!(mine.nodes("node-e1"), ["e1"], "by its selector");
    let empty = edited(r#"{"f:spec":{"f:nodeSelector":{}}}"#, "b").decide();
    assert!(empty.delete.is_empty(), "it has no nodes, but it is the person's");
    assert_eq!(empty.create[0].metadata.name.as_deref(), Some("node-e1-auto"), "the rule makes its own one");
    // Endpoints that a person adds leave it the rule's.
    let extended = edited(r#"{"f:spec":{"f:endpoints":{}}}"#, "b");
    assert!(extended.decide().create.is_empty());
    assert_eq!(extended.apply(3).nodes("node-e1"), ["e1"]);
}

#[test]
fn with_rules_off_a_rule_gateway_counts_as_user_written() {
    let mut cluster = Cluster::with_rules().node(node("c1", "10.1.1.0/24")).apply(1).apply(2);
    cluster.0.rules = false;
    let decisions = cluster.decide();
    assert!(decisions.create.is_empty() && decisions.delete.is_empty());
    assert_eq!(cluster.apply(3).nodes("cloud"), ["c1"]);
}
