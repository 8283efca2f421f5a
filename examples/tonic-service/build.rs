//! The service `example.Clock`, described in Rust: no protoc is needed.

use tonic_build::manual::{Builder, Method, Service};

fn main() {
    let method = |name: &str, route: &str| {
        Method::builder()
            .name(name)
            .route_name(route)
            .input_type("crate::Wait")
            .output_type("crate::Tick")
            .codec_path("tonic_prost::ProstCodec")
    };
    let clock = Service::builder()
        .name("Clock")
        .package("example")
        .method(method("after", "After").build())
        .method(method("every", "Every").server_streaming().build())
        .build();
    Builder::new().compile(&[clock]);
}
