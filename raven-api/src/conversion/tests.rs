//! Both round trips are lossless, and a v1alpha1 client changes only the fields that it writes.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};
use proptest::prelude::*;
use proptest::{collection, option};
use serde_json::json;

use super::*;
use crate::gateway::{Encryption, ExposeType, NodeInfo};

// Few values, so that similar endpoints are frequent.
fn endpoint() -> impl Strategy<Value = v1beta1::Endpoint> {
    let texts = (option::of("[a-c]"), option::of("[a-c]"), collection::btree_map("[a-c]", "[a-c\"\\\\é]{0,2}", 0..3));
    let ports = (option::of(prop_oneof![Just(4500), 1..65536]), option::of(1..65536));
    ("[a-c]", any::<(bool, bool)>(), ports, texts).prop_map(
        |(node, (proxy, under_nat), (port, public_port), (public_ip, nat_type, config))| v1beta1::Endpoint {
            node_name: node,
            type_: if proxy { EndpointType::Proxy } else { EndpointType::Tunnel },
            port,
            under_nat,
            nat_type,
            public_port,
            public_ip,
            config,
        },
    )
}

fn metadata() -> impl Strategy<Value = ObjectMeta> {
    let annotations = option::of(collection::btree_map("[a-c]", "[a-c]", 1..3));
    (annotations, option::of(1..9i64)).prop_map(|(annotations, generation)| ObjectMeta {
        name: Some("g".to_owned()),
        uid: Some("7".to_owned()),
        annotations,
        generation,
        ..Default::default()
    })
}

fn selector() -> impl Strategy<Value = Option<LabelSelector>> {
    let labels = option::of(collection::btree_map("[a-c]", "[a-c]", 0..3));
    option::of(labels.prop_map(|match_labels| LabelSelector { match_labels, match_expressions: None }))
}

fn expose() -> impl Strategy<Value = ExposeType> {
    prop_oneof![Just(ExposeType::Edge), Just(ExposeType::PublicIP), Just(ExposeType::LoadBalancer)]
}

fn nodes() -> impl Strategy<Value = Vec<NodeInfo>> {
    let subnets = collection::vec("[a-c]", 0..3);
    collection::vec(
        ("[a-c]", "[a-c]", collection::vec("[a-c]", 0..3), subnets, option::of("[a-c]")).prop_map(
            |(node_name, private_ip, private_ips, subnets, public_key)| NodeInfo {
                node_name,
                private_ip,
                private_ips,
                subnets,
                public_key,
            },
        ),
        0..3,
    )
}

fn condition() -> impl Strategy<Value = Condition> {
    ("[a-c]", any::<bool>(), option::of(1..9i64), 0..9i64).prop_map(|(type_, ok, observed_generation, second)| {
        Condition {
            type_,
            status: if ok { "True" } else { "False" }.to_owned(),
            reason: "Because".to_owned(),
            message: "in \"words\"".to_owned(),
            observed_generation,
            last_transition_time: Time(Timestamp::from_second(second).expect("a small number")),
        }
    })
}

fn configs() -> impl Strategy<Value = (Option<ProxyConfig>, Option<TunnelConfig>, Encryption)> {
    let proxy = (0..3i32, option::of("[0-9]{2}"), option::of("[0-9]{2}")).prop_map(
        |(replicas, proxy_http_port, proxy_https_port)| ProxyConfig { replicas, proxy_http_port, proxy_https_port },
    );
    let encryption = prop_oneof![Just(Encryption::Gateways), Just(Encryption::Pool)];
    (option::of(proxy), option::of((0..3i32).prop_map(|replicas| TunnelConfig { replicas })), encryption)
}

fn new_gateway() -> impl Strategy<Value = v1beta1::Gateway> {
    let spec = (selector(), expose(), configs(), collection::vec(endpoint(), 0..5)).prop_map(
        |(node_selector, expose_type, (proxy_config, tunnel_config, encryption), endpoints)| v1beta1::GatewaySpec {
            node_selector,
            expose_type,
            proxy_config,
            tunnel_config,
            encryption,
            endpoints,
        },
    );
    let conditions = collection::vec(condition(), 0..3);
    let status = (nodes(), collection::vec(endpoint(), 0..3), any::<bool>(), conditions, option::of(1..9i64)).prop_map(
        |(nodes, active_endpoints, exposed, conditions, observed_generation)| v1beta1::GatewayStatus {
            node_count: i32::try_from(nodes.len()).expect("three at most"),
            nodes,
            active_endpoints,
            exposed,
            conditions,
            observed_generation,
        },
    );
    (metadata(), spec, option::of(status)).prop_map(|(metadata, spec, status)| v1beta1::Gateway {
        metadata,
        spec,
        status,
    })
}

fn old_gateway() -> impl Strategy<Value = v1alpha1::Gateway> {
    let endpoint = || endpoint().prop_map(|e| endpoint_to_v1alpha1(&e));
    let spec = (selector(), expose(), collection::vec(endpoint(), 0..5)).prop_map(
        |(node_selector, expose_type, endpoints)| v1alpha1::GatewaySpec { node_selector, expose_type, endpoints },
    );
    let status = (nodes(), option::of(endpoint()))
        .prop_map(|(nodes, active_endpoint)| v1alpha1::GatewayStatus { nodes, active_endpoint });
    (metadata(), spec, option::of(status)).prop_map(|(metadata, spec, status)| v1alpha1::Gateway {
        metadata,
        spec,
        status,
    })
}

// Serializes and parses, as the API server does.
fn through_json<T: Serialize + DeserializeOwned>(object: &T) -> T {
    let text = serde_json::to_string(object).expect("an object is JSON");
    serde_json::from_str(&text).expect("it can be parsed again")
}

proptest! {
    #[test]
    fn v1alpha1_round_trip_is_lossless(old in old_gateway()) {
        let new = through_json(&to_v1beta1(old.clone()));
        prop_assert_eq!(to_v1alpha1(new), old);
    }

    #[test]
    fn v1beta1_round_trip_is_lossless(new in new_gateway()) {
        let old = through_json(&to_v1alpha1(new.clone()));
        prop_assert_eq!(to_v1beta1(old), new);
    }

    #[test]
    fn conversion_changes_only_two_annotations_of_the_metadata(new in new_gateway()) {
        let mut old = to_v1alpha1(new.clone()).metadata;
        put::<()>(&mut old, ANNOTATION_SPEC, None);
        put::<()>(&mut old, ANNOTATION_STATUS, None);
        old.annotations = old.annotations.filter(|a| !a.is_empty());
        prop_assert_eq!(old, new.metadata);
    }

    #[test]
    fn v1alpha1_client_changes_only_what_it_writes(mut new in new_gateway(), which in any::<prop::sample::Index>()) {
        // With one endpoint per node, the match is unambiguous.
        let mut seen = std::collections::BTreeSet::new();
        new.spec.endpoints.retain(|e| seen.insert(e.node_name.clone()));
        let mut old = to_v1alpha1(new.clone());
        let mut expected = new;
        if let Some(last) = old.spec.endpoints.len().checked_sub(1) {
            let which = which.index(last + 1);
            old.spec.endpoints[which].public_ip = Some("192.0.2.7".to_owned());
            old.spec.endpoints.swap(which, last);
            expected.spec.endpoints[which].public_ip = Some("192.0.2.7".to_owned());
            expected.spec.endpoints.swap(which, last);
        }
        old.spec.expose_type = ExposeType::LoadBalancer;
        expected.spec.expose_type = ExposeType::LoadBalancer;
        prop_assert_eq!(to_v1beta1(old), expected);
    }
}

fn old_from_json() -> v1alpha1::Gateway {
    serde_json::from_value(json!({
        "apiVersion": "raven.openyurt.io/v1alpha1",
        "kind": "Gateway",
        "metadata": {"name": "g"},
        "spec": {"exposeType": "LoadBalancer", "endpoints": [{"nodeName": "a", "publicIP": "192.0.2.1", "config": {"k": "v"}}]},
        "status": {"nodes": [{"nodeName": "a", "privateIP": "10.0.0.1"}], "activeEndpoint": {"nodeName": "a"}},
    }))
    .expect("a v1alpha1 Gateway")
}

#[test]
fn fields_missing_in_v1alpha1_get_upstreams_defaults() {
    let new = serde_json::to_value(to_v1beta1(old_from_json())).expect("JSON");
    let endpoint = json!({"nodeName": "a", "type": "tunnel", "port": 4500, "underNAT": false, "publicIP": "192.0.2.1", "config": {"k": "v"}});
    assert_eq!(
        new["spec"],
        json!({
            "exposeType": "LoadBalancer", "proxyConfig": {"Replicas": 1}, "tunnelConfig": {"Replicas": 1}, "endpoints": [endpoint],
        })
    );
    assert_eq!(
        new["status"],
        json!({
            "nodes": [{"nodeName": "a", "privateIP": "10.0.0.1"}],
            "nodeCount": 1,
            "activeEndpoints": [{"nodeName": "a", "type": "tunnel", "port": 4500, "underNAT": false}],
        })
    );
    assert_eq!(new["apiVersion"], "raven.openyurt.io/v1beta1");
}

#[test]
fn first_active_endpoint_becomes_the_v1alpha1_endpoint() {
    let mut new = to_v1beta1(old_from_json());
    let active = |name: &str| v1beta1::Endpoint { node_name: name.to_owned(), ..Default::default() };
    new.status.as_mut().expect("it has one").active_endpoints = vec![active("b"), active("a")];
    let old = to_v1alpha1(new);
    assert_eq!(old.status.and_then(|s| s.active_endpoint).map(|e| e.node_name).as_deref(), Some("b"));
}

#[test]
fn endpoint_added_in_v1alpha1_is_a_tunnel_and_removed_one_is_deleted() {
    let mut new = to_v1beta1(old_from_json());
    new.spec.tunnel_config = Some(TunnelConfig { replicas: 2 });
    new.spec.endpoints[0].type_ = EndpointType::Proxy;
    let mut old = to_v1alpha1(new);
    old.spec.endpoints.insert(0, v1alpha1::Endpoint { node_name: "b".to_owned(), ..Default::default() });
    let back = to_v1beta1(old.clone());
    let seen: Vec<_> = back.spec.endpoints.iter().map(|e| (e.node_name.as_str(), e.type_, e.port)).collect();
    assert_eq!(seen, [("b", EndpointType::Tunnel, Some(4500)), ("a", EndpointType::Proxy, Some(4500))]);
    assert_eq!(back.tunnel_replicas(), 2);
    old.spec.endpoints.pop();
    assert_eq!(to_v1beta1(old).spec.endpoints.len(), 1);
}

#[test]
fn malformed_annotation_counts_as_absent() {
    let mut old = old_from_json();
    old.metadata.annotations = Some([(ANNOTATION_SPEC.to_owned(), "{".to_owned())].into());
    let new = to_v1beta1(old);
    assert_eq!((new.tunnel_replicas(), new.metadata.annotations), (1, None));
}
