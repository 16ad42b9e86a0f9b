//! Watches Gateways, GatewayNodes, three ConfigMaps and where the API server is; gives the latest [`Inputs`], coalesced, once all lists are complete.
//!
//! Never Nodes or Pods: what ten thousand agents cost the API server stays small.

use std::{fmt::Debug, net::IpAddr, time::Duration};

use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use k8s_openapi::api::{core::v1::ConfigMap, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt, reflector, watcher},
};
use raven_api::{
    Gateway, GatewayNode, Guarded,
    guarded::Told,
    proxy::{CA_KEY, CA_NAME, ready},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    snapshot,
    topology::{AGENT_CONFIG, Inputs, SWITCHES, Settings},
};

/// The API server's own EndpointSlice. Nothing waits for it: where RBAC does not allow it yet, the client's own address is what is known.
const API_SERVERS: &str = "EndpointSlice kubernetes";
/// Events that follow each other this closely are one change …
const SETTLE: Duration = Duration::from_millis(50);
/// … for so long.
const BURST: Duration = Duration::from_secs(1);

/// What an event says: `Some`: this list is complete now; `None`: something in it changed.
type Seen = Option<&'static str>;

/// Runs until the process ends. What it saw last stays valid while the API server is away.
pub async fn run(client: Client, namespace: &str, latest: watch::Sender<Option<Inputs>>) {
    let all = watcher::Config::default;
    let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    let (gateways, a) = reflected("Gateways", Api::<Gateway>::all(client.clone()), all());
    let (nodes, b) = reflected("GatewayNodes", Api::<Guarded<GatewayNode>>::all(client), all());
    let (switches, c) = reflected(SWITCHES, configs.clone(), named(SWITCHES));
    let (agent, d) = reflected(AGENT_CONFIG, configs.clone(), named(AGENT_CONFIG));
    let (ca, e) = reflected(CA_NAME, configs, named(CA_NAME));
    let (api_servers, f) = reflected(API_SERVERS, slices, named("kubernetes"));
    let mut told = Told::of("GatewayNode");
    let mut waiting = vec!["Gateways", "GatewayNodes", SWITCHES, AGENT_CONFIG, CA_NAME];
    let mut events = stream::select_all([a, b, c, d, e, f]);
    while let Some(seen) = events.next().await {
        waiting.retain(|list| Some(*list) != seen);
        if !waiting.is_empty() {
            continue;
        }
        // A burst (a roll-out, a list after an outage) is one change, until it pauses or has lasted long enough: each change is
        // looked at with everything else.
        let end = Instant::now() + BURST;
        while let Ok(Some(_)) = timeout_at(end.min(Instant::now() + SETTLE), events.next()).await {}
        let (gateways, nodes) = (listed(&gateways), readable(listed(&nodes), &mut told));
        let data = |store: &reflector::Store<ConfigMap>| store.state().first().and_then(|c| c.data.clone()).unwrap_or_default();
        let inputs = snapshot::lean(&Inputs {
            api_servers: api_servers.state().iter().flat_map(|slice| addresses(slice)).collect(),
            // Of what nodes observe, the one thing that somebody else's way depends on.
            ready_proxies: ready(&gateways, &nodes).into_iter().map(str::to_owned).collect(),
            gateways,
            gateway_nodes: nodes,
            settings: Settings::parse(&data(&switches), &data(&agent)),
            proxy_ca: data(&ca).remove(CA_KEY).unwrap_or_default(),
        });
        latest.send_if_modified(|have| {
            let changed = have.as_ref() != Some(&inputs);
            if changed {
                *have = Some(inputs);
            }
            changed
        });
    }
}

fn addresses(slice: &EndpointSlice) -> Vec<IpAddr> {
    slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).filter_map(|text| text.parse().ok()).collect()
}

fn listed<K: Resource<DynamicType = ()> + Clone + 'static>(store: &reflector::Store<K>) -> Vec<K> {
    store.state().iter().map(|object| (**object).clone()).collect()
}

/// Nodes write these themselves, and the API server lets more pass for a time than we can read: what one of them (stolen, say) writes must
/// not blind all others.
fn readable(nodes: Vec<Guarded<GatewayNode>>, told: &mut Told) -> Vec<GatewayNode> {
    told.keep(nodes.iter());
    let read = nodes.into_iter().filter_map(|node| {
        if let Some(news) = told.news(&node) {
            tracing::warn!("{news}");
        }
        node.0.ok()
    });
    read.collect()
}

fn reflected<K>(what: &'static str, api: Api<K>, config: watcher::Config) -> (reflector::Store<K>, BoxStream<'static, Seen>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let events = watcher(api, config)
        .default_backoff()
        .reflect(writer)
        .inspect_err(move |e| tracing::warn!("watch {what}: {e}; keeping what was seen last"))
        .filter_map(move |event| async move {
            match event.ok()? {
                watcher::Event::InitDone => Some(Some(what)),
                watcher::Event::Apply(_) | watcher::Event::Delete(_) => Some(None),
                watcher::Event::Init | watcher::Event::InitApply(_) => None,
            }
        })
        .boxed();
    (store, events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_node_writes_does_not_blind_the_others() {
        let node = |name: &str, handshake: &str| {
            let object = serde_json::json!({
                "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": { "name": name }, "spec": { "gateway": "x", "version": "1" },
                "status": { "peers": [{ "nodeName": "y", "gateway": "y", "lastHandshake": handshake }] },
            });
            serde_json::from_str::<Guarded<GatewayNode>>(&object.to_string()).expect("never an error")
        };
        // Both pass the API server's check of the format.
        let list =
            vec![node("good", "2026-01-01T00:00:00Z"), node("bad", "2026-01-01T00:00:00+99:99"), node("worse", "2026-01-01T00:00:00ZTx")];
        let mut told = Told::of("GatewayNode");
        let read = readable(list.clone(), &mut told);
        assert_eq!(read.iter().map(|n| n.metadata.name.as_deref()).collect::<Vec<_>>(), [Some("good")]);
        assert!(list.iter().all(|node| told.news(node).is_none()), "each is named once");
        assert_eq!(readable(Vec::new(), &mut told).len(), 0);
        assert_eq!(list.iter().filter_map(|node| told.news(node)).count(), 2, "and once more when it comes back");
        let mut told = Told::of("GatewayNode");
        let news: Vec<String> = list.iter().filter_map(|node| told.news(node)).collect();
        assert!(matches!(&news[..], [bad, worse] if bad.contains("GatewayNode bad ") && worse.contains("GatewayNode worse ")), "{news:?}");
    }
}
