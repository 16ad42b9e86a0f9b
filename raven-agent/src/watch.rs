//! Watches Gateways, three ConfigMaps, the API server's EndpointSlice and the node's own GatewayNode, and publishes the
//! latest [`Inputs`] once all lists are complete. Bursts of events are coalesced.
//!
//! Nodes, Pods and other nodes' GatewayNodes, which change often, are never watched: ten thousand agents must cost the API
//! server little, and a site on a metered link must not pay for the activity of other sites.

mod outages;

use std::{
    collections::BTreeMap,
    fmt::Debug,
    net::IpAddr,
    time::{Duration, Instant as StdInstant},
};

pub use outages::Outages;

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
    names::{AGENT_CONFIG_MAP, API_SERVER_NAMESPACE, API_SERVER_SLICE, SWITCHES_CONFIG_MAP},
    proxy::{CA_KEY, CA_NAME},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    snapshot,
    topology::{ClusterSettings, Inputs, forget_published},
};

/// The API server's own EndpointSlice. The agent does not wait for this list: if RBAC does not allow it, only the
/// client's own address of the API server is known.
const API_SERVERS: &str = "EndpointSlice kubernetes";
/// The node's own GatewayNode.
const OWN_NODE: &str = "own GatewayNode";
/// Events within this time of each other are one change.
const SETTLE: Duration = Duration::from_millis(50);
/// Maximum length of one change.
const BURST: Duration = Duration::from_secs(1);

/// `Some`: the named list is complete. `None`: an object changed.
type Progress = Option<&'static str>;

/// Runs until the process ends. The last inputs stay valid while the API server is unavailable; `outages` records how
/// long that has been. `own`: whether the GatewayNode of `node` exists, once that is known.
pub async fn run(
    client: Client,
    namespace: &str,
    node: &str,
    latest: watch::Sender<Option<Inputs>>,
    own: watch::Sender<Option<bool>>,
    outages: Outages,
) {
    // Bookmarks would be most of what a quiet cluster sends. All Gateways are watched, so the last one's version is recent
    // enough to continue a watch; a list of one object costs as little as a bookmark.
    let all = || watcher::Config::default().disable_bookmarks();
    let named = |name: &str| all().fields(&format!("metadata.name={name}"));
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), API_SERVER_NAMESPACE);
    let (gateways, a) = reflected("Gateways", Api::<Gateway>::all(client.clone()), all(), &outages);
    // Its outages do not count either: if it is deleted, it is created again a little later.
    let (own_node, b) = reflected(OWN_NODE, Api::<Guarded<GatewayNode>>::all(client), named(node), &Outages::default());
    let (switches, c) = reflected(SWITCHES_CONFIG_MAP, configs.clone(), named(SWITCHES_CONFIG_MAP), &outages);
    let (agent, d) = reflected(AGENT_CONFIG_MAP, configs.clone(), named(AGENT_CONFIG_MAP), &outages);
    let (ca, e) = reflected(CA_NAME, configs, named(CA_NAME), &outages);
    // Its outages do not count, because the agent works without it.
    let (api_servers, f) = reflected(API_SERVERS, slices, named(API_SERVER_SLICE), &Outages::default());
    let mut incomplete = vec!["Gateways", SWITCHES_CONFIG_MAP, AGENT_CONFIG_MAP, CA_NAME];
    let mut events = stream::select_all([a, b, c, d, e, f]);
    while let Some(progress) = events.next().await {
        if progress == Some(OWN_NODE) || own.borrow().is_some() {
            own.send_replace(Some(!own_node.is_empty()));
        }
        incomplete.retain(|list| Some(*list) != progress);
        if !incomplete.is_empty() {
            continue;
        }
        // A burst (a roll-out, a list after an outage) is one change until it pauses or reaches its maximum length:
        // every change rebuilds the whole topology.
        let end = Instant::now() + BURST;
        while let Ok(Some(_)) = timeout_at(end.min(Instant::now() + SETTLE), events.next()).await {}
        let data = |store: &reflector::Store<ConfigMap>| {
            store.state().first().and_then(|c| c.data.clone()).unwrap_or_default()
        };
        let inputs = snapshot::lean(&Inputs {
            api_servers: api_servers.state().iter().flat_map(|slice| addresses(slice)).collect(),
            gateways: gateways.state().iter().map(|object| (**object).clone()).collect(),
            gateway_nodes: Vec::new(),
            settings: ClusterSettings::parse(&data(&switches), &data(&agent)),
            proxy_ca: data(&ca).remove(CA_KEY).unwrap_or_default(),
            resolved: BTreeMap::new(),
        });
        latest.send_if_modified(|have| {
            let Inputs { resolved, gateway_nodes, .. } = have.clone().unwrap_or_default();
            let mut inputs = Inputs { resolved, gateway_nodes, ..inputs };
            forget_published(&mut inputs);
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

fn reflected<K>(
    what: &'static str,
    api: Api<K>,
    config: watcher::Config,
    outages: &Outages,
) -> (reflector::Store<K>, BoxStream<'static, Progress>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let outages = outages.clone();
    let events = watcher(api, config)
        .default_backoff()
        .reflect(writer)
        .inspect_err(move |e| {
            tracing::warn!(list = what, error = %e, "watch failed; the last seen objects stay in use until it is restored");
            outages.record(what, e.to_string(), StdInstant::now());
        })
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
