//! What gateway nodes have published is in the status of their Gateway: agents watch nothing else.

use raven_api::gateway::{CONFIG_PUBLIC_KEY, Encryption, EndpointType};
use raven_api::proxy::CONFIG_PROXY_READY;

use super::build::*;
use super::cases::two_pools;
use crate::gateway::facts::PublishedKey;

fn config<'a>(cluster: &'a Cluster, gateway: &str, type_: EndpointType, key: &str) -> Option<&'a str> {
    let endpoint = cluster.active(gateway).iter().find(|e| e.type_ == type_).expect("one is elected");
    endpoint.config.get(key).map(String::as_str)
}

/// The published key of a Gateway's tunnel node.
fn key(cluster: &Cluster, gateway: &str) -> Option<String> {
    config(cluster, gateway, EndpointType::Tunnel, CONFIG_PUBLIC_KEY).map(str::to_owned)
}

fn key_of(key: &str, proven: bool) -> PublishedKey {
    PublishedKey { key: key.to_owned(), proven }
}

#[test]
fn key_is_published_and_stays_while_its_gateway_node_cannot_be_read() {
    let mut cluster = two_pools().apply(1);
    assert_eq!(key(&cluster, "edge"), None, "the agent has not published one");
    cluster.0.keys.insert("e1".into(), key_of("key-1", false));
    let mut cluster = cluster.apply(2);
    assert_eq!(key(&cluster, "edge").as_deref(), Some("key-1"));
    cluster.0.keys.clear();
    let mut cluster = cluster.apply(3);
    assert_eq!(key(&cluster, "edge").as_deref(), Some("key-1"));
    cluster.0.keys.insert("e1".into(), key_of("key-2", false));
    let cluster = cluster.apply(4);
    assert_eq!(key(&cluster, "edge").as_deref(), Some("key-2"));
    // Its successor does not inherit the key, nor does the node when it returns.
    let mut cluster = cluster.without_agent("e1");
    cluster.0.keys.clear();
    let cluster = cluster.apply(5);
    assert_eq!((cluster.tunnel("edge"), key(&cluster, "edge")), (vec!["e2".to_owned()], None));
}

#[test]
fn readiness_of_a_proxy_is_observed_and_never_taken_from_the_spec() {
    let ready =
        |cluster: &Cluster| config(cluster, "cloud", EndpointType::Proxy, CONFIG_PROXY_READY).map(str::to_owned);
    let mut cluster = two_pools().apply(1);
    let mut cloud = listing(cluster.resource("cloud").clone(), EndpointType::Proxy, &["c1"]);
    for endpoint in &mut cloud.spec.endpoints {
        endpoint.config.insert(CONFIG_PROXY_READY.to_owned(), "true".to_owned());
    }
    cluster = cluster.gateway(cloud).apply(2);
    assert_eq!(ready(&cluster), None);
    let elected = cluster.elected("cloud", EndpointType::Proxy);
    cluster.0.ready_proxies.insert(elected[0].as_str().into());
    assert_eq!(ready(&cluster.apply(3)).as_deref(), Some("true"));
}

/// A stolen node of the older Gateway, or a machine that was cloned from another one's disk, has the other's key.
#[test]
fn key_belongs_to_the_node_that_published_it_first() {
    let some = |key: &str| Some(key.to_owned());
    let mut cluster = two_pools().gateway(gateway("other", 3)).node(member("other", "o1", "10.3.1.0/24"));
    for (node, own) in [("c1", "key-c"), ("e1", "key-e"), ("o1", "key-o")] {
        cluster.0.keys.insert(node.into(), key_of(own, false));
    }
    let mut cluster = cluster.apply(1);
    cluster.0.keys.insert("e1".into(), key_of("key-o", false));
    let decided = cluster.decide();
    let notices: Vec<_> = decided.gateways[&"edge".into()].refusals.iter().filter_map(|r| r.notice.as_ref()).collect();
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert_eq!((&notices[0].to, notices[0].reason), (&"other".into(), "PublicKeyClaimed"));
    let cluster = cluster.apply(2);
    assert_eq!((key(&cluster, "edge"), key(&cluster, "other")), (some("key-e"), some("key-o")), "its own key stays");
    cluster.assert_condition(
        "edge",
        "Accepted",
        "False",
        "PublicKeyTaken",
        "node e1 has published the WireGuard key of node o1",
    );
    cluster.assert_condition("other", "Accepted", "True", "Accepted", "in force");
    // The other node's GatewayNode is unreadable or deleted: it still has its key.
    let mut cluster = cluster;
    cluster.0.keys.remove(&"o1".into());
    let mut cluster = cluster.apply(3);
    assert_eq!((key(&cluster, "edge"), key(&cluster, "other")), (some("key-e"), some("key-o")));
    // It has another key: the first one is free.
    cluster.0.keys.insert("o1".into(), key_of("key-o2", false));
    let cluster = cluster.apply(4).apply(5);
    assert_eq!((key(&cluster, "edge"), key(&cluster, "other")), (some("key-o"), some("key-o2")));
}

#[test]
fn key_that_two_nodes_publish_at_once_stays_with_the_exposed_gateway() {
    let mut cluster = Cluster::new()
        .gateway(gateway("edge", 1))
        .gateway(exposed(gateway("cloud", 2)))
        .node(member("edge", "e1", "10.2.1.0/24"))
        .node(member("cloud", "c1", "10.1.1.0/24"));
    for node in ["e1", "c1"] {
        cluster.0.keys.insert(node.into(), key_of("key", false));
    }
    let cluster = cluster.apply(1).apply(2);
    assert_eq!(
        (key(&cluster, "edge").as_deref(), key(&cluster, "cloud").as_deref()),
        (Some(""), Some("key")),
        "agents keep a key that is only missing"
    );
}

/// A thief knows the key of a node that was not elected when the thief published it.
#[test]
fn node_that_proves_its_key_takes_it_from_one_that_does_not() {
    let some = |key: &str| Some(key.to_owned());
    let mut cluster = two_pools().gateway(gateway("other", 3)).node(member("other", "o1", "10.3.1.0/24"));
    cluster.0.keys.insert("e1".into(), key_of("key-o", false));
    let mut cluster = cluster.apply(1).apply(2);
    assert_eq!(key(&cluster, "edge"), some("key-o"), "the first, and no other claim");
    cluster.0.keys.insert("o1".into(), key_of("key-o", true));
    let mut cluster = cluster.apply(3);
    assert_eq!((key(&cluster, "edge"), key(&cluster, "other")), (some(""), some("key-o")));
    cluster.assert_condition("edge", "Accepted", "False", "PublicKeyTaken", "the WireGuard key of node o1");
    // A clone of its disk can prove the key, too, and comes too late.
    cluster.0.keys.insert("e1".into(), key_of("key-o", true));
    let cluster = cluster.apply(4).apply(5);
    assert_eq!((key(&cluster, "edge"), key(&cluster, "other")), (some(""), some("key-o")));
}

#[test]
fn keys_of_all_nodes_are_published_in_a_pool_with_encryption() {
    let member_keys = |cluster: &Cluster| -> Vec<Option<String>> {
        let status = cluster.resource("edge").status.clone().expect("a status");
        status.nodes.into_iter().map(|node| node.public_key).collect()
    };
    let some = |key: &str| Some(key.to_owned());
    let mut cluster = two_pools();
    for (node, key) in [("c1", "key-c"), ("e1", "key-1"), ("e2", "key-2")] {
        cluster.0.keys.insert(node.into(), key_of(key, true));
    }
    let cluster = cluster.apply(1);
    assert_eq!(member_keys(&cluster), [None, None], "without encryption, only those of elected nodes");
    let mut edge = cluster.resource("edge").clone();
    edge.spec.encryption = Encryption::Pool;
    let mut cluster = cluster.gateway(edge);
    let published = cluster.0.keys.remove(&"e2".into()).expect("a key");
    let mut cluster = cluster.apply(2);
    cluster.assert_condition(
        "edge",
        "Ready",
        "True",
        "Degraded",
        "no WireGuard key, so their packets to and from other pools may be dropped: e2;",
    );
    cluster.0.keys.insert("e2".into(), published);
    let mut cluster = cluster.apply(3);
    cluster.assert_condition("edge", "Ready", "True", "Ready", "");
    assert_eq!(member_keys(&cluster), [some("key-1"), some("key-2")]);
    cluster.0.keys.remove(&"e2".into());
    let mut cluster = cluster.apply(4);
    assert_eq!(member_keys(&cluster), [some("key-1"), some("key-2")], "stays while its GatewayNode cannot be read");
    cluster.assert_condition("edge", "Ready", "True", "Degraded", "no WireGuard key");
    cluster.0.switches.l3 = false;
    let mut cluster = cluster.apply(4);
    cluster.assert_condition("edge", "Ready", "True", "Ready", "");
    cluster.0.switches.l3 = true;
    // A stolen member has the key of a gateway node.
    cluster.0.keys.insert("e2".into(), key_of("key-c", false));
    let cluster = cluster.apply(5);
    assert_eq!(member_keys(&cluster), [some("key-1"), some("key-2")]);
    let refused = "node e2 has published the WireGuard key of node c1";
    cluster.assert_condition("edge", "Accepted", "False", "PublicKeyTaken", refused);
}
