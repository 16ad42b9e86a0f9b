//! What gateway nodes have published is in the status of their Gateway: agents watch nothing else.

use raven_api::gateway::{CONFIG_PUBLIC_KEY, EndpointType};
use raven_api::proxy::CONFIG_PROXY_READY;

use super::build::*;
use super::cases::two_pools;

fn config<'a>(cluster: &'a Cluster, gateway: &str, type_: EndpointType, key: &str) -> Option<&'a str> {
    let endpoint = cluster.active(gateway).iter().find(|e| e.type_ == type_).expect("one is elected");
    endpoint.config.get(key).map(String::as_str)
}

#[test]
fn key_is_published_and_stays_while_its_gateway_node_cannot_be_read() {
    let key = |cluster: &Cluster| config(cluster, "edge", EndpointType::Tunnel, CONFIG_PUBLIC_KEY).map(str::to_owned);
    let mut cluster = two_pools().apply(1);
    assert_eq!(key(&cluster), None, "the agent has not published one");
    cluster.0.keys.insert("e1".into(), "key-1".to_owned());
    let mut cluster = cluster.apply(2);
    assert_eq!(key(&cluster).as_deref(), Some("key-1"));
    cluster.0.keys.clear();
    let mut cluster = cluster.apply(3);
    assert_eq!(key(&cluster).as_deref(), Some("key-1"));
    cluster.0.keys.insert("e1".into(), "key-2".to_owned());
    let cluster = cluster.apply(4);
    assert_eq!(key(&cluster).as_deref(), Some("key-2"));
    // Its successor does not inherit the key, nor does the node when it returns.
    let mut cluster = cluster.without_agent("e1");
    cluster.0.keys.clear();
    let cluster = cluster.apply(5);
    assert_eq!((cluster.tunnel("edge"), key(&cluster)), (vec!["e2".to_owned()], None));
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
