//! Gateways of v1alpha1 as v1beta1 and back: pure functions, for the conversion webhook.
//!
//! To v1beta1: replicas of both kinds are 1, endpoints are of type tunnel on port 4500. Back: the first active endpoint is taken. What
//! v1alpha1 has no field for travels in two annotations of the v1alpha1 object and is put back on the way to v1beta1, so that a client
//! of the old version that reads an object and writes it again changes nothing but what it means to change. (The API server itself
//! sends the status there and back when it updates a spec in the old version, so the status is kept, too.)
//! An object whose annotations were lost on the way (`kubectl replace` of a bare file) is what its v1alpha1 fields say.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::DEFAULT_TUNNEL_PORT;
use crate::gateway::{self as v1beta1, EndpointType, ProxyConfig, TunnelConfig};
use crate::gateway_v1alpha1 as v1alpha1;

/// Annotation on a v1alpha1 Gateway: JSON of what its spec cannot hold.
pub const ANNOTATION_SPEC: &str = "raven.openyurt.io/v1beta1-spec";
/// Annotation on a v1alpha1 Gateway: JSON of what its status cannot hold.
pub const ANNOTATION_STATUS: &str = "raven.openyurt.io/v1beta1-status";

// Endpoints whole, in their order: by them is known which one a v1alpha1 endpoint was.
#[derive(Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct KeptSpec {
    proxy_config: Option<ProxyConfig>,
    tunnel_config: Option<TunnelConfig>,
    endpoints: Vec<v1beta1::Endpoint>,
}

// Without the nodes, which both versions have and which may be thousands.
#[derive(Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct KeptStatus {
    active_endpoints: Vec<v1beta1::Endpoint>,
    conditions: Vec<Condition>,
    observed_generation: Option<i64>,
}

/// `old` as v1beta1.
pub fn to_v1beta1(old: v1alpha1::Gateway) -> v1beta1::Gateway {
    let mut metadata = old.metadata;
    let kept_spec = take::<KeptSpec>(&mut metadata, ANNOTATION_SPEC);
    let kept_status = take::<KeptStatus>(&mut metadata, ANNOTATION_STATUS);
    v1beta1::Gateway { metadata, spec: spec_to_v1beta1(old.spec, kept_spec), status: old.status.map(|s| status_to_v1beta1(s, kept_status)) }
}

/// `new` as v1alpha1.
pub fn to_v1alpha1(new: v1beta1::Gateway) -> v1alpha1::Gateway {
    let mut metadata = new.metadata;
    let spec = spec_to_v1alpha1(&new.spec);
    // What the old fields say by themselves needs no annotation.
    let plain = spec_to_v1beta1(spec.clone(), None) == new.spec;
    let kept = KeptSpec { proxy_config: new.spec.proxy_config, tunnel_config: new.spec.tunnel_config, endpoints: new.spec.endpoints };
    put(&mut metadata, ANNOTATION_SPEC, (!plain).then_some(&kept));

    let old_status = new.status.as_ref().map(status_to_v1alpha1);
    let plain = old_status.clone().map(|s| status_to_v1beta1(s, None)) == new.status;
    let kept = new.status.filter(|_| !plain).map(|s| KeptStatus {
        active_endpoints: s.active_endpoints,
        conditions: s.conditions,
        observed_generation: s.observed_generation,
    });
    put(&mut metadata, ANNOTATION_STATUS, kept.as_ref());
    v1alpha1::Gateway { metadata, spec, status: old_status }
}

fn spec_to_v1beta1(old: v1alpha1::GatewaySpec, kept: Option<KeptSpec>) -> v1beta1::GatewaySpec {
    let (proxy_config, tunnel_config, endpoints) = match kept {
        Some(kept) => (kept.proxy_config, kept.tunnel_config, recognise(old.endpoints, kept.endpoints)),
        None => {
            let endpoints = old.endpoints.into_iter().map(endpoint_to_v1beta1).collect();
            (Some(ProxyConfig::default()), Some(TunnelConfig::default()), endpoints)
        }
    };
    v1beta1::GatewaySpec { node_selector: old.node_selector, expose_type: old.expose_type, proxy_config, tunnel_config, endpoints }
}

fn spec_to_v1alpha1(new: &v1beta1::GatewaySpec) -> v1alpha1::GatewaySpec {
    v1alpha1::GatewaySpec {
        node_selector: new.node_selector.clone(),
        expose_type: new.expose_type,
        endpoints: new.endpoints.iter().map(endpoint_to_v1alpha1).collect(),
    }
}

fn status_to_v1beta1(old: v1alpha1::GatewayStatus, kept: Option<KeptStatus>) -> v1beta1::GatewayStatus {
    let node_count = i32::try_from(old.nodes.len()).unwrap_or(i32::MAX);
    let (active_endpoints, conditions, observed_generation) = match kept {
        Some(kept) if kept.active_endpoints.first().map(endpoint_to_v1alpha1) == old.active_endpoint => {
            (kept.active_endpoints, kept.conditions, kept.observed_generation)
        }
        // Somebody of the old version elected another one: of the others nothing is known any more.
        Some(kept) => (old.active_endpoint.into_iter().map(endpoint_to_v1beta1).collect(), kept.conditions, kept.observed_generation),
        None => (old.active_endpoint.into_iter().map(endpoint_to_v1beta1).collect(), Vec::new(), None),
    };
    v1beta1::GatewayStatus { nodes: old.nodes, node_count, active_endpoints, conditions, observed_generation }
}

fn status_to_v1alpha1(new: &v1beta1::GatewayStatus) -> v1alpha1::GatewayStatus {
    v1alpha1::GatewayStatus { nodes: new.nodes.clone(), active_endpoint: new.active_endpoints.first().map(endpoint_to_v1alpha1) }
}

fn endpoint_to_v1beta1(old: v1alpha1::Endpoint) -> v1beta1::Endpoint {
    v1beta1::Endpoint { type_: EndpointType::Tunnel, port: Some(DEFAULT_TUNNEL_PORT.into()), ..overlaid(v1beta1::Endpoint::default(), old) }
}

fn endpoint_to_v1alpha1(new: &v1beta1::Endpoint) -> v1alpha1::Endpoint {
    v1alpha1::Endpoint {
        node_name: new.node_name.clone(),
        under_nat: new.under_nat,
        public_ip: new.public_ip.clone(),
        config: new.config.clone(),
    }
}

fn overlaid(below: v1beta1::Endpoint, old: v1alpha1::Endpoint) -> v1beta1::Endpoint {
    v1beta1::Endpoint { node_name: old.node_name, under_nat: old.under_nat, public_ip: old.public_ip, config: old.config, ..below }
}

// Each v1alpha1 endpoint on top of the kept one that it was: first those that did not change (so an untouched list comes back as it
// was, also one that names a node twice), then, of what is left, by node. One that is nobody's is new.
fn recognise(old: Vec<v1alpha1::Endpoint>, kept: Vec<v1beta1::Endpoint>) -> Vec<v1beta1::Endpoint> {
    let mut free: Vec<Option<v1beta1::Endpoint>> = kept.into_iter().map(Some).collect();
    let mut claim = |matches: &dyn Fn(&v1beta1::Endpoint) -> bool| {
        free.iter_mut().find(|slot| slot.as_ref().is_some_and(matches)).and_then(Option::take)
    };
    let unchanged: Vec<Option<v1beta1::Endpoint>> = old.iter().map(|e| claim(&|kept| endpoint_to_v1alpha1(kept) == *e)).collect();
    let pairs = old.into_iter().zip(unchanged);
    pairs
        .map(|(endpoint, unchanged)| match unchanged.or_else(|| claim(&|kept| kept.node_name == endpoint.node_name)) {
            Some(kept) => overlaid(kept, endpoint),
            None => endpoint_to_v1beta1(endpoint),
        })
        .collect()
}

// JSON that is not ours (somebody edited it) counts as absent: a conversion must not fail, or the object could not even be read.
fn take<T: DeserializeOwned>(metadata: &mut ObjectMeta, key: &str) -> Option<T> {
    let annotations = metadata.annotations.as_mut()?;
    let text = annotations.remove(key)?;
    if annotations.is_empty() {
        metadata.annotations = None;
    }
    serde_json::from_str(&text).ok()
}

fn put<T: Serialize>(metadata: &mut ObjectMeta, key: &str, kept: Option<&T>) {
    if let Some(annotations) = metadata.annotations.as_mut() {
        annotations.remove(key);
    }
    if let Some(kept) = kept {
        let text = serde_json::to_string(kept).expect("texts, numbers and maps with text keys always are JSON");
        metadata.annotations.get_or_insert_with(BTreeMap::new).insert(key.to_owned(), text);
    }
}

#[cfg(test)]
mod tests;
