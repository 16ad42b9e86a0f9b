//! What must never go into the tunnel, claimed all the same; and prefixes that a CNI gives out by itself.

use anyhow::{Context, Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, PostParams};
use kube::discovery::ApiResource;
use raven_api::LABEL_GATEWAY;
use raven_tests::eventually;
use serde_json::json;

use crate::stage::{SOON, Stage, elects, nodes, play, says, status};

const CRD: &str = "blockaffinities.crd.projectcalico.org";

#[tokio::test(flavor = "multi_thread")]
async fn what_must_stay_out_of_the_tunnel_is_refused_and_everything_else_works_on() {
    play("what_must_stay_out_of_the_tunnel_is_refused_and_everything_else_works_on", async |stage| {
        stage.put_two_pools().await?;
        stage.put_node("nobodys", 9, &[]).await?;
        let _controller = stage.controller("one", &["--auto-gateways=false", "--service-cidr=10.111.0.0/16"]).await?;
        stage.two_pools_are_ready().await?;
        let cloud = stage.raw("cloud").await?;
        let own = ["10.244.3.0/24", "fd00:244:3::/64"];

        // What the API server says of itself: its address (an EndpointSlice), its ranges of Service addresses (ServiceCIDRs).
        let refused = [
            ("0.0.0.0/0", "is the whole address space"),
            ("::/0", "is the whole address space"),
            ("127.0.0.0/8", "127.0.0.0/8 (loopback"),
            ("169.254.0.0/16", "169.254.0.0/16 (link-local"),
            ("224.0.0.0/4", "224.0.0.0/4 (multicast"),
            ("10.0.0.0/24", "overlaps 10.0.0.5/32 (the API server's address)"),
            ("10.96.7.0/24", "overlaps 10.96.0.0/16 (the range of Service addresses"),
            ("fd00:96::/64", "overlaps fd00:96::/112 (the range of Service addresses"),
            ("10.111.0.0/24", "overlaps 10.111.0.0/16 (the range of Service addresses"),
            ("10.1.0.1/32", "overlaps 10.1.0.1/32 (address of node c-a in Gateway cloud)"),
            ("10.1.0.9/32", "overlaps 10.1.0.9/32 (address of node nobodys, which is in no pool)"),
            ("198.51.100.0/24", "overlaps 198.51.100.10/32 (publicIP of node c-a in Gateway cloud, at which peers reach its tunnel)"),
        ];
        for (prefix, part) in refused {
            stage.put_extra_prefixes("site", prefix).await?;
            let told =
                stage.until("site", &format!("does not get {prefix}"), |g| says(g, "Accepted", "False", "PrefixProtected", part)).await?;
            assert_eq!(status(&told).nodes[1].subnets, own, "{prefix} is in no status");
            elects(&told, &["x-b"])?;
            says(&told, "Ready", "True", "Degraded", part)?;
            assert_eq!(stage.event("site", "PrefixProtected", part).await?, "Warning");
        }
        // The site's own LAN, its nodes in it, is what the annotation is for; and refusals do not stick.
        stage.put_extra_prefixes("site", "10.1.0.2/31, 192.168.7.0/24").await?;
        let taken = stage.until("site", "gets its LAN", |g| says(g, "Accepted", "True", "Accepted", "")).await?;
        assert_eq!(status(&taken).nodes[1].subnets, [&own[..], &["10.1.0.2/31", "192.168.7.0/24"]].concat());

        // A podCIDR is refused like that, too: that node takes part without it.
        let api_server_in_it = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "x-c", "labels": {LABEL_GATEWAY: "site"}},
            "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]}});
        stage.nodes().create(&PostParams::default(), &serde_json::from_value(api_server_in_it)?).await?;
        stage.put_node_status("x-c", "a-person", json!({"addresses": [{"type": "InternalIP", "address": "10.1.0.4"}]})).await?;
        let part = "podCIDR 10.0.0.0/24 of node x-c overlaps 10.0.0.5/32 (the API server's address)";
        let told = stage
            .until("site", "does not get the podCIDR", |g| {
                // Its address comes a moment after the node itself.
                ensure!(nodes(g) == ["x-a", "x-b", "x-c"], "its nodes: {:?}", nodes(g));
                says(g, "Accepted", "False", "PrefixProtected", part)
            })
            .await?;
        assert_eq!(status(&told).nodes[2].subnets, Vec::<String>::new());

        // A node that says it lives in another pool's pods takes nothing from them.
        stage.put_node_status("x-c", "a-person", json!({"addresses": [{"type": "InternalIP", "address": "10.244.1.66"}]})).await?;
        let part = "InternalIP 10.244.1.66 of node x-c lies in 10.244.1.0/24 of node c-a in Gateway cloud";
        stage.until("site", "has a node in the cloud's pods", |g| says(g, "Accepted", "False", "PrefixProtected", part)).await?;

        // And one without an address cannot be elected, listed or not.
        let spec = crate::stage::site(&["x-d", "x-b"]);
        stage.put_node("x-d", 8, &[(LABEL_GATEWAY, "site")]).await?;
        stage.put_node_status("x-d", "a-person", json!({"addresses": [{"type": "Hostname", "address": "x-d"}]})).await?;
        stage.put_gateway("site", spec).await?;
        let told = stage
            .until("site", "has a listed node without an address", |g| says(g, "Accepted", "False", "EndpointNodeUnaddressed", "node x-d"))
            .await?;
        elects(&told, &["x-b"])?;

        stage.fence().await?;
        assert_eq!(stage.raw("cloud").await?, cloud, "nothing of this is the cloud's business");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_calico_gives_out_addresses_a_pool_has_its_blocks() {
    play("where_calico_gives_out_addresses_a_pool_has_its_blocks", async |stage| {
        stage.put_two_pools().await?;
        let _controller = stage.controller("one", &[]).await?;
        stage.two_pools_are_ready().await?;
        let cloud = stage.raw("cloud").await?;

        install_calico(stage).await?;
        let blocks: Api<DynamicObject> = Api::all_with(stage.lab.cluster().client(), &affinities());
        for (node, cidr, state) in
            [("x-a", "10.50.0.64/26", "confirmed"), ("x-a", "10.50.0.0/26", "confirmed"), ("x-b", "10.50.1.0/26", "pending")]
        {
            put_block(&blocks, node, cidr, state).await?;
        }
        subnets_become(stage, "x-a", &["10.50.0.0/26", "10.50.0.64/26"]).await?;
        subnets_become(stage, "x-b", &["10.244.3.0/24", "fd00:244:3::/64"]).await?;

        // Two pools claim it: one is told, as with any prefix.
        put_block(&blocks, "x-b", "10.50.0.64/27", "confirmed").await?;
        let part = "Calico block 10.50.0.64/27 of node x-b overlaps 10.50.0.64/26 of node x-a in Gateway site";
        stage.until("site", "has two nodes with one block", |g| says(g, "Accepted", "False", "PrefixClaimedTwice", part)).await?;
        blocks.delete("x-b-10-50-0-64-27", &DeleteParams::default()).await?;

        // A block moves as Calico moves it: confirmed elsewhere after it was given back.
        blocks.delete("x-a-10-50-0-64-26", &DeleteParams::default()).await?;
        put_block(&blocks, "x-b", "10.50.0.64/26", "confirmed").await?;
        subnets_become(stage, "x-a", &["10.50.0.0/26"]).await?;
        subnets_become(stage, "x-b", &["10.50.0.64/26"]).await?;
        stage.until("site", "is at peace", |g| says(g, "Accepted", "True", "Accepted", "")).await?;
        assert_eq!(stage.raw("cloud").await?, cloud, "nothing of this is the cloud's business");

        // Calico is taken away again.
        let crds: Api<CustomResourceDefinition> = Api::all(stage.lab.cluster().client());
        crds.delete(CRD, &DeleteParams::default()).await?;
        subnets_become(stage, "x-a", &["10.244.2.0/24", "fd00:244:2::/64"]).await
    })
    .await;
}

async fn subnets_become(stage: &Stage, node: &str, expected: &[&str]) -> Result<()> {
    let check = |gateway: &raven_api::Gateway| {
        let status = status(gateway);
        let found = status.nodes.iter().find(|n| n.node_name == node).context("not in the pool")?;
        ensure!(found.subnets == expected, "{:?}", found.subnets);
        Ok(())
    };
    stage.until("site", &format!("has {expected:?} at {node}"), check).await.map(drop)
}

fn affinities() -> ApiResource {
    ApiResource {
        group: "crd.projectcalico.org".to_owned(),
        version: "v1".to_owned(),
        api_version: "crd.projectcalico.org/v1".to_owned(),
        kind: "BlockAffinity".to_owned(),
        plural: "blockaffinities".to_owned(),
    }
}

// Shaped as Calico's: all four fields, `deleted` a string.
async fn install_calico(stage: &Stage) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(stage.lab.cluster().client());
    let text = json!({"type": "string"});
    let spec = json!({"type": "object", "required": ["cidr", "deleted", "node", "state"], "properties": {"cidr": text, "deleted": text, "node": text, "state": text}});
    let schema = json!({"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}});
    let crd = serde_json::from_value(json!({
        "metadata": {"name": CRD},
        "spec": {
            "group": "crd.projectcalico.org",
            "scope": "Cluster",
            "names": {"kind": "BlockAffinity", "plural": "blockaffinities"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": schema}],
        },
    }))?;
    crds.create(&PostParams::default(), &crd).await.map(drop).context("create the CRD")
}

async fn put_block(blocks: &Api<DynamicObject>, node: &str, cidr: &str, state: &str) -> Result<()> {
    let name = format!("{node}-{}", cidr.replace(['.', '/'], "-"));
    let spec = json!({"node": node, "cidr": cidr, "state": state, "deleted": "false"});
    let block = DynamicObject::new(&name, &affinities()).data(json!({ "spec": spec }));
    eventually(SOON, "the API server takes BlockAffinities", async || Ok(blocks.create(&PostParams::default(), &block).await.map(drop)?))
        .await
}
