marlinq_add_cpu_isa(NAME avx_vnni PROCESSORS "x86_64|AMD64" FLAGS -mavx2 -mfma -mf16c -mavxvnni)
