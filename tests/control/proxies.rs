//! What leads clients to gateway nodes: the internal Service, the hosts file, load balancers and their addresses.

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use raven_api::LABEL_GATEWAY;
use raven_api::proxy::{DNS_CONFIG_MAP, DNS_KEY, INTERNAL_SERVICE};
use raven_tests::eventually;
use serde_json::json;

use crate::stage::{SOON, play};

#[tokio::test(flavor = "multi_thread")]
async fn load_balancers_are_made_for_gateways_that_ask_and_their_addresses_are_what_others_dial() {
    play("load_balancers_are_made_for_gateways_that_ask_and_their_addresses_are_what_others_dial", async |stage| {
        let client = stage.lab.cluster().client();
        let services: Api<Service> = Api::namespaced(client.clone(), "kube-system");
        let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "kube-system");
        stage.put_node("c-a", 1, &[(LABEL_GATEWAY, "cloud")]).await?;
        stage.put_node("x-a", 2, &[(LABEL_GATEWAY, "site"), ("openyurt.io/is-edge-worker", "true")]).await?;
        let apply = async |name: &str, spec: serde_json::Value| {
            let gateway = json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "Gateway", "metadata": {"name": name}, "spec": spec});
            stage.gateways.patch(name, &PatchParams::apply("a-person"), &Patch::Apply(&gateway)).await.map(drop)
        };
        apply("cloud", json!({"exposeType": "LoadBalancer", "proxyConfig": {"proxyHTTPSPort": "10250,9443"}})).await?;
        apply("site", json!({"endpoints": [{"nodeName": "x-a", "type": "tunnel", "underNAT": true}]})).await?;
        // As upstream's Raven leaves them behind.
        let left: Api<Endpoints> = Api::namespaced(client.clone(), "kube-system");
        let addresses = json!([{"addresses": [{"ip": "10.1.0.9"}], "ports": [{"name": "https-10250", "port": 10263}]}]);
        let object = serde_json::from_value(json!({"metadata": {"name": INTERNAL_SERVICE}, "subsets": addresses}))?;
        left.create(&PostParams::default(), &object).await?;
        let _controller = stage.controller("one", &[]).await?;

        let balancers = ListParams::default().labels("raven.openyurt.io/gateway-type");
        let two = eventually(SOON, "a Service for the proxy and one for the tunnel", async || {
            let found = services.list(&balancers).await?.items;
            ensure!(found.len() == 2, "{} of them", found.len());
            Ok(found)
        })
        .await?;
        for service in &two {
            let (name, spec) = (service.metadata.name.clone().context("a name")?, service.spec.clone().context("a spec")?);
            assert_eq!((spec.type_.as_deref(), spec.external_traffic_policy.as_deref()), (Some("LoadBalancer"), Some("Local")), "{name}");
            let port = spec.ports.iter().flatten().next().context("a port")?;
            let proxy = name.starts_with("x-raven-proxy-svc-cloud-");
            assert_eq!((port.port, port.protocol.as_deref()), if proxy { (10262, Some("TCP")) } else { (4500, Some("UDP")) }, "{name}");
            let slice = eventually(SOON, "the slice that goes with it", async || Ok(slices.get(&name).await?)).await?;
            assert_eq!(slice.endpoints[0].addresses, ["10.1.0.1"]);
            let ingress = if proxy { json!([{"ip": "203.0.113.7"}]) } else { json!([{"hostname": "lb.example", "ip": "203.0.113.8"}]) };
            let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
            services.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await?;
        }
        stage
            .until("cloud", "has the load balancers' addresses", |g| {
                let active = json!(g.status)["activeEndpoints"].clone();
                ensure!(active[0]["publicIP"] == "203.0.113.8" && active[1]["publicIP"] == "203.0.113.7", "{active}");
                Ok(())
            })
            .await?;

        // The names of edge nodes lead to the internal Service, those of cloud nodes to themselves.
        let maps: Api<ConfigMap> = Api::namespaced(client, "kube-system");
        eventually(SOON, "the hosts file", async || {
            let service = services.get(INTERNAL_SERVICE).await?.spec.context("a spec")?;
            let ports: Vec<i32> = service.ports.iter().flatten().map(|p| p.port).collect();
            ensure!(ports == [10255, 9443, 10250], "{ports:?}");
            let ip = service.cluster_ip.context("an address")?;
            let hosts = maps.get(DNS_CONFIG_MAP).await?.data.and_then(|mut d| d.remove(DNS_KEY)).context("no file yet")?;
            ensure!(hosts == format!("10.1.0.1\tc-a\n{ip}\tx-a\n"), "it says {hosts:?}");
            Ok(())
        })
        .await?;

        // What nobody asks for any more goes.
        eventually(SOON, "upstream's Endpoints are gone", async || {
            ensure!(left.get_opt(INTERNAL_SERVICE).await?.is_none(), "they are there");
            Ok(())
        })
        .await?;
        stage.gateways.delete("cloud", &DeleteParams::default()).await?;
        eventually(SOON, "the load balancers are gone", async || {
            let left = services.list(&balancers).await?.items.len();
            ensure!(left == 0, "{left} are left");
            Ok(())
        })
        .await
    })
    .await;
}
