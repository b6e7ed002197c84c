//! Makes the fuzz targets find libtorch at run time: the main crate's link arguments reach its own binaries only.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_TRAIN").is_some() {
        let linked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.libtorch");
        let libtorch = std::env::var_os("LIBTORCH").map_or(linked, Into::into);
        let libtorch = libtorch.canonicalize().unwrap_or(libtorch);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libtorch.join("lib").display());
    }
}
